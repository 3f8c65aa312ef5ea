"""Small chat templates in the formats of the families, with what decides about their dialects."""

QWEN = r"""
{%- if tools %}
{{- '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- 'Answer with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""

_TOOLS = "{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"

QWEN_CODER = (
    _TOOLS
    + r"""
{%- if tools %}{{ '<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n...' }}
{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\n' }}{{ value if value is string else value | tojson }}
{{- '\n</parameter>\n' }}
{%- endfor %}{{ '</function>\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endfor %}{{ '<|im_start|>assistant\n' }}"""
)

GLM = (
    "[gMASK]<sop>"
    + _TOOLS
    + r"""
{%- if tools %}{{ '<tool_call>NAME\n<arg_key>K</arg_key>\n<arg_value>V</arg_value>\n</tool_call>' }}
{%- endif %}
{%- for message in messages %}{{ '<|' + message.role + '|>\n' }}
{%- if message.role == 'assistant' %}
{{- '<think>' + (message.reasoning_content or '') + '</think>\n' }}
{%- endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>' + call.function.name + '\n' }}
{%- for name, value in call.function.arguments.items() %}
{{- '<arg_key>' + name + '</arg_key>\n<arg_value>' }}
{{- value if value is string else value | tojson }}{{ '</arg_value>\n' }}
{%- endfor %}{{ '</tool_call>' }}
{%- endfor %}
{%- endfor %}{{ '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif %}"""
)

GRANITE = (
    _TOOLS
    + r"""
{%- if tools %}{{ 'Respond with <|tool_call|> and a JSON list of tools used.' }}{% endif %}
{%- if thinking %}
{{- "Write your thoughts after 'Here is my thought process:' and your response after " }}
{{- "'Here is my response:'." }}
{%- endif %}
{%- for message in messages %}{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' }}
{{- message.content }}
{%- if message.tool_calls %}{{ '<|tool_call|>[' }}
{%- for call in message.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}' }}{{ ', ' if not loop.last }}
{%- endfor %}{{ ']' }}
{%- endif %}{{ '<|end_of_text|>\n' }}
{%- endfor %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}"""
)

GRANITE_TAGS = GRANITE.replace("Here is my thought process:", "<think></think>").replace(
    "Here is my response:", "<response></response>"
)

LLAMA = (
    _TOOLS
    + r"""
{%- if tools %}
{{- 'Respond with {"name": function name, "parameters": dictionary of names and values}.' }}
{%- endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
{%- else %}{{ message.content }}{% endif %}{{ '<|eot_id|>' }}
{%- endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"""
)

PYTHONIC = (
    _TOOLS
    + r"""
{%- if tools %}{{ 'Use [func_name1(param1=value1, param2=value2), func_name2(...)].' }}{% endif %}
{%- for message in messages %}
{{- '<|header_start|>' + message.role + '<|header_end|>\n\n' + message.content }}
{%- if message.tool_calls %}{{ '[' }}
{%- for call in message.tool_calls %}{{ call.function.name + '(' }}
{%- for name in call.function.arguments %}
{{- name + '=' + (call.function.arguments[name] | tojson) }}{{ ', ' if not loop.last }}
{%- endfor %}{{ ')' }}{{ ', ' if not loop.last }}
{%- endfor %}{{ ']' }}
{%- endif %}{{ '<|eot|>' }}
{%- endfor %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}"""
)

MISTRAL = r"""
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}
{%- endfor %}{{ ']</s>' }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id }}
{{- '"}[/TOOL_RESULTS]' }}
{%- else %}{{ message.content + '</s>' }}{% endif %}
{%- endfor %}"""

MINISTRAL = r"""
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- else %}
{%- if message.reasoning_content %}
{{- '[THINK]' + message.reasoning_content + '[/THINK]' }}
{%- endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}
{{- call.function.arguments if call.function.arguments is string
    else call.function.arguments | tojson }}
{%- endfor %}{{ '</s>' }}{% endif %}
{%- endfor %}"""

DEEPSEEK_31 = (
    (
        _TOOLS
        + """
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- elif message.role == 'tool' %}{{ '<|tool▁output▁begin|>' + message.content }}
{%- else %}{{ '<|Assistant|></think>' + message.content }}
{%- if message.tool_calls %}{{ '<|tool▁calls▁begin|>' }}
{%- for call in message.tool_calls %}
{{- '<|tool▁call▁begin|>' + call.function.name + '<|tool▁sep|>' + call.function.arguments }}
{{- '<|tool▁call▁end|>' }}
{%- endfor %}{{ '<|tool▁calls▁end|>' }}{% endif %}{{ '<|end▁of▁sentence|>' }}
{%- endif %}
{%- endfor %}{{ '<|Assistant|>' }}{{ '<think>' if thinking else '</think>' }}"""
    )
    .replace("|>", "\uff5c>")
    .replace("<|", "<\uff5c")
)

DEEPSEEK_R1 = (
    (
        _TOOLS
        + """
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content + '<|Assistant|>' }}
{%- elif message.role == 'tool' %}{{ '<|tool▁output▁begin|>' + message.content }}
{%- elif message.content is none %}{{ '<|tool▁calls▁begin|>' }}
{%- for call in message.tool_calls %}
{{- '<|tool▁call▁begin|>' + call.type + '<|tool▁sep|>' + call.function.name + '\\n```json\\n' }}
{{- call.function.arguments + '\\n```<|tool▁call▁end|>' }}
{%- endfor %}{{ '<|tool▁calls▁end|>' }}
{%- else %}{{ message.content.split('</think>')[-1] }}
{%- endif %}
{%- endfor %}{{ '<think>\\n' }}"""
    )
    .replace("|>", "\uff5c>")
    .replace("<|", "<\uff5c")
)

HARMONY = r"""
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|># Tools\n' }}
{%- for tool in tools %}{{ '// ' + tool.function.description + '\n' + tool.function.name }}
{%- for name, each in tool.function.parameters.properties.items() %}
{{- '// ' + each.description + '\n' + name }}
{%- endfor %}
{%- endfor %}{{ '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
{%- if message.role == 'assistant' and 'tool_calls' in message %}
{%- set call = message.tool_calls[0].function %}
{%- if message.content and message.thinking %}{{ raise_exception('not both') }}{% endif %}
{%- if message.content or message.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + (message.content or message.thinking) }}
{{- '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson }}{{ '<|call|>' }}
{%- set last.name = call.name %}
{%- elif message.role == 'tool' %}
{%- if last.name is none %}{{ raise_exception('no call') }}{% endif %}
{{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- message.content | tojson }}{{ '<|end|>' }}
{%- else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}{{ '<|start|>assistant' }}"""

PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
