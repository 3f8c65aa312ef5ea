// Markdown into DOM nodes. A model's text becomes text nodes and a few known elements, never HTML:
// all it writes is shown, and nothing of it is run or fetched. Time is linear in the text, and depth
// is bounded, whatever it is.

const MOST_NESTED = 12;

// Shows a text that grows: blocks that are as they were keep their nodes.
export class MarkdownView {
  constructor(target) {
    this.target = target;
    this.sources = [];
  }

  show(text) {
    const blocks = [...blocksOf(text.replace(/\r\n?/g, "\n").split("\n"), 0)];
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.sources[same]) same++;
    while (this.target.childNodes.length > same) this.target.lastChild.remove();
    appendAll(this.target, blocks.slice(same).map((block) => block.build()));
    this.sources = blocks.map((block) => block.source);
  }
}

function element(name, children, className) {
  const made = document.createElement(name);
  if (className) made.className = className;
  appendAll(made, children);
  return made;
}

function appendAll(parent, children) {  // there may be more than a call takes
  for (const child of children) parent.append(child);
}

// Blocks. A reader looks at the lines from one on and tells where its block ends and how it is
// built, or gives nothing.

const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( *)([-*+•]|\d{1,9}[.)])( +|$)/;
const DELIMITER = /^:?-+:?$/;

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;
const isRule = (line) => /^([-*_])\1{2,}$/.test(line.replace(/[ \t]/g, ""));
const isTable = (lines, at) => lines[at].includes("|") && columnsOf(lines, at) !== null;

function* blocksOf(lines, depth) {
  for (let at = 0; at < lines.length;) {
    if (isBlank(lines[at])) { at++; continue; }
    let read = null;
    for (const reader of READERS) if ((read = reader(lines, at, depth))) break;
    yield {source: lines.slice(at, read.end).join("\n"), build: read.build};
    at = read.end;
  }
}

const build = (lines, depth) => [...blocksOf(lines, depth)].map((block) => block.build());

function fence(lines, at) {
  const found = FENCE.exec(lines[at]);
  if (!found) return null;
  const [, indent, mark, info] = found;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= mark.length && text === mark[0].repeat(text.length);
  };
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const body = lines.slice(at + 1, end).map((line) => dedent(line, indent.length));
  return {end: Math.min(end + 1, lines.length), build: () => code(body, info.trim().split(/\s/)[0])};
}

const dedent = (line, width) => line.slice(Math.min(width, indentOf(line)));

function indented(lines, at) {
  const isCode = (line) => /^(?: {4}|\t)/.test(line);
  if (!isCode(lines[at])) return null;
  let end = at + 1;
  for (let next = end; next < lines.length && (isBlank(lines[next]) || isCode(lines[next])); next++) {
    if (isCode(lines[next])) end = next + 1;
  }
  const body = lines.slice(at, end).map((line) => line.replace(/^(?: {1,4}|\t)/, ""));
  return {end, build: () => code(body, "")};
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  let text = lines[at].slice(found[0].length).trim(), stop = text.length;
  while (text[stop - 1] === "#") stop--;
  if (stop === 0 || text[stop - 1] === " ") text = text.slice(0, stop).trim();
  // The page's own heading is the first.
  const name = `h${Math.min(found[1].length + 1, 6)}`;
  return {end: at + 1, build: () => element(name, inline(text))};
}

function rule(lines, at) {
  return isRule(lines[at]) ? {end: at + 1, build: () => element("hr", [])} : null;
}

function quote(lines, at, depth) {
  if (depth >= MOST_NESTED || !QUOTE.test(lines[at])) return null;
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const body = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return {end, build: () => element("blockquote", build(body, depth + 1))};
}

function markerOf(line) {
  const found = MARKER.exec(line);
  if (!found) return null;
  const [, {length: indent}, mark, space] = found;
  const width = space.length >= 1 && space.length <= 4 ? space.length : 1;
  const isNumber = mark.length > 1;
  return {indent, content: indent + mark.length + width, kind: mark.at(-1),
          start: isNumber ? parseInt(mark, 10) : null};
}

function list(lines, at, depth) {
  const first = markerOf(lines[at]);
  if (!first || depth >= MOST_NESTED) return null;
  const items = [];
  let end = at, isLoose = false;
  for (let next = at; next < lines.length;) {
    const marker = markerOf(lines[next]);
    if (!marker || marker.kind !== first.kind || isRule(lines[next])) break;
    isLoose ||= next > end;
    const item = itemOf(lines, next, marker);
    items.push(item.body);
    next = end = item.end;
    while (next < lines.length && isBlank(lines[next])) next++;
  }
  return {end, build: () => {
    const made = element(first.start === null ? "ul" : "ol", items.map((body) => listItem(body, depth)));
    if (first.start !== null) made.start = first.start;
    if (isLoose) made.className = "loose";
    return made;
  }};
}

// The lines of an item without its indentation. Models are careless with it, so a list inside may
// stand less far in than the item's text, and text that goes on may stand anywhere.
function itemOf(lines, at, marker) {
  let content = marker.content, end = at + 1;
  const body = [lines[at].slice(content)];
  const isNested = (line) => indentOf(line) >= marker.indent + 2 && markerOf(line) !== null;
  while (end < lines.length) {
    let next = end;
    while (next < lines.length && isBlank(lines[next])) next++;
    if (next === lines.length) break;
    const line = lines[next], indent = indentOf(line);
    if (indent < content) {
      const goesOn = next === end && !begins(lines, next);
      if (isNested(line)) content = indent;
      else if (!goesOn) break;
    }
    for (; end < next; end++) body.push("");
    body.push(dedent(line, content));
    end++;
  }
  return {body, end};
}

function listItem(body, depth) {
  const task = /^\[([ xX])\] /.exec(body[0]);
  if (!task) return element("li", build(body, depth + 1));
  const box = element("input", []);
  box.type = "checkbox";
  box.disabled = true;
  box.checked = task[1] !== " ";
  return element("li", [box, ...build([body[0].slice(4), ...body.slice(1)], depth + 1)], "task");
}

function cellsOf(line) {
  const cells = [""];
  const text = line.trim();
  for (let at = text[0] === "|" ? 1 : 0; at < text.length; at++) {
    if (text[at] === "\\" && text[at + 1] === "|") { cells.push(cells.pop() + "|"); at++; }
    else if (text[at] === "|") cells.push("");
    else cells[cells.length - 1] += text[at];
  }
  if (text.endsWith("|") && !text.endsWith("\\|")) cells.pop();
  return cells.map((cell) => cell.trim());
}

// How the columns of a table are aligned, if there is one.
function columnsOf(lines, at) {
  const line = lines[at + 1] ?? "";
  if (!line.includes("|") || !line.includes("-")) return null;
  const delimiters = cellsOf(line);
  if (!delimiters.every((cell) => DELIMITER.test(cell))) return null;
  if (delimiters.length !== cellsOf(lines[at]).length) return null;
  return delimiters.map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "left";
  });
}

function table(lines, at) {
  if (!isTable(lines, at)) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const columns = columnsOf(lines, at);
  const row = (name, line) => {
    const cells = cellsOf(line).slice(0, columns.length);
    return element("tr", cells.map((text, column) => {
      const cell = element(name, inline(text));
      cell.style.textAlign = columns[column];
      return cell;
    }));
  };
  return {end, build: () => {
    const head = element("thead", [row("th", lines[at])]);
    const body = element("tbody", lines.slice(at + 2, end).map((line) => row("td", line)));
    return element("div", [element("table", [head, body])], "table");
  }};
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !begins(lines, end)) end++;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return {end, build: () => element("p", inline(text))};
}

// Whether a block begins in the middle of a paragraph.
function begins(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line)
    || markerOf(line) !== null || isTable(lines, at);
}

const READERS = [fence, rule, heading, quote, list, table, indented, paragraph];

function code(lines, language) {
  const text = lines.join("\n");
  const copy = element("button", ["Copy"]);
  const shown = element("pre", [element("code", [text])]);
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await copyText(text, shown);
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  shown.tabIndex = 0;  // so that it can be scrolled with keys
  const caption = element("figcaption", [element("span", [language]), copy]);
  return element("figure", [caption, shown], "code");
}

async function copyText(text, shown) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Pages that came without TLS from another machine have no clipboard, but may copy what is marked.
  getSelection().selectAllChildren(shown);
  document.execCommand("copy");
}

// Text within a block. Items are nodes, with how deep they nest, or marks that may yet turn out to
// begin something; the emphasis is CommonMark's algorithm, without its second pass.

const PLAIN = /[^\\`*_~[\]<!h\n]+/y;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const BREAK = /<br ?\/?>|\\?\n/iy;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const ADDRESS = /https?:\/\/[^\s<>"`]{1,2000}/iy;
const TARGET = /\(\s{0,9}<?([^\s<>()]{1,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,2000})?)>?(?:\s{1,9}"[^"]{0,500}")?\s{0,9}\)/y;
const SAFE = /^(?:https?:\/\/|mailto:)/i;
const TAGS = {"*1": "em", "*2": "strong", "_1": "em", "_2": "strong", "~2": "del"};

function inline(text) {
  return new Inline(text).nodes();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.items = [];
    this.openers = [];  // places of marks that may begin emphasis
    this.brackets = [];  // places of brackets that may begin a link
    this.lowest = {};  // below which of the openers a kind of mark has nothing to end
  }

  nodes() {
    while (this.at < this.text.length) {
      this.take(PLAIN, (found) => this.add(found[0]))
        || this.take(ESCAPED, (found) => this.add(found[1]))
        || this.take(BREAK, () => this.add(element("br", [])))
        || this.special(this.text[this.at])
        || this.add(this.text[this.at++]);
    }
    return this.items.map(nodeOf);
  }

  take(pattern, use) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (!found) return false;
    this.at = pattern.lastIndex;
    use(found);
    return true;
  }

  add(node, height = 0) {
    const last = this.items.at(-1);
    if (typeof node === "string" && typeof last?.node === "string") last.node += node;
    else this.items.push({node, height});
    return true;
  }

  special(char) {
    switch (char) {
      case "`": return this.codeSpan();
      case "*": case "_": case "~": return this.mark(char);
      case "!": case "[": return this.bracket(char);
      case "]": return this.link();
      case "<": return this.take(AUTOLINK, (found) => this.add(anchor(found[1], [found[1]]), 1));
      case "h": return this.bareLink();
      default: return false;
    }
  }

  run(char) {
    let end = this.at;
    while (this.text[end] === char) end++;
    return end - this.at;
  }

  codeSpan() {
    const length = this.run("`"), ticks = "`".repeat(length), start = this.at + length;
    this.at = start;
    for (let end = start; (end = this.text.indexOf(ticks, end)) >= 0;) {
      let stop = end + length;
      while (this.text[stop] === "`") stop++;
      if (stop === end + length) {
        this.at = stop;
        const shown = this.text.slice(start, end).replaceAll("\n", " ");
        const isPadded = shown.startsWith(" ") && shown.endsWith(" ") && !isBlank(shown);
        return this.add(element("code", [isPadded ? shown.slice(1, -1) : shown]), 1);
      }
      end = stop;
    }
    return this.add(ticks);
  }

  mark(char) {
    const count = this.run(char);
    const before = this.text[this.at - 1] ?? " ", after = this.text[this.at + count] ?? " ";
    this.at += count;
    const isSpace = (c) => /\s/.test(c), isSign = (c) => /[\p{P}\p{S}]/u.test(c);
    const left = !isSpace(after) && (!isSign(after) || isSpace(before) || isSign(before));
    const right = !isSpace(before) && (!isSign(before) || isSpace(after) || isSign(after));
    const isWord = char === "_";
    const mark = {
      char, count, length: count,
      opens: left && (!isWord || !right || isSign(before)),
      closes: right && (!isWord || !left || isSign(after)),
    };
    if (mark.closes) this.close(mark);
    if (mark.count > 0) {
      if (mark.opens) this.openers.push(this.items.length);
      this.items.push(mark);
    }
    return true;
  }

  close(closer) {
    const kind = `${closer.char}${closer.opens}${closer.length % 3}`;
    while (closer.count > 0) {
      let place = this.openers.length - 1;
      const floor = this.lowest[kind] ?? 0;
      while (place >= floor && !pairs(this.items[this.openers[place]], closer)) place--;
      if (place < floor) {
        this.lowest[kind] = this.openers.length;
        return;
      }
      this.wrap(place, closer);
    }
  }

  wrap(place, closer) {
    const start = this.openers[place], opener = this.items[start];
    const used = Math.min(opener.count, closer.count, 2);
    const inner = this.items.splice(start + 1);
    opener.count -= used;
    closer.count -= used;
    this.openers.length = opener.count > 0 ? place + 1 : place;
    if (opener.count === 0) this.items.pop();
    this.forget(start);
    this.addAround((nodes) => element(TAGS[closer.char + used], nodes), inner);
  }

  addAround(make, inner) {
    const height = 1 + inner.reduce((most, item) => Math.max(most, item.height ?? 0), 0);
    const nodes = inner.map(nodeOf);
    if (height <= MOST_NESTED) this.add(make(nodes), height);
    else {
      const flat = document.createDocumentFragment();
      appendAll(flat, nodes);
      this.add(flat, height - 1);
    }
  }

  // What stood behind a place is part of an element now and begins nothing any more.
  forget(place) {
    while (this.brackets.length && this.brackets.at(-1) >= place) this.brackets.pop();
    while (this.openers.length && this.openers.at(-1) > place) this.openers.pop();
    for (const kind of Object.keys(this.lowest)) {
      this.lowest[kind] = Math.min(this.lowest[kind], this.openers.length);
    }
  }

  bracket(char) {
    const shown = char === "!" ? "![" : "[";
    if (!this.text.startsWith(shown, this.at)) return false;
    this.at += shown.length;
    this.brackets.push(this.items.length);
    this.items.push({char: shown, count: 1});
    return true;
  }

  // Pictures are links too: to fetch one would tell somebody that it was looked at.
  link() {
    this.at++;
    const start = this.brackets.pop();
    const isLink = start !== undefined && this.take(TARGET, ([whole, address]) => {
      if (!SAFE.test(address)) return this.add("]" + whole);
      const inner = this.items.splice(start + 1);
      this.items.pop();
      this.forget(start - 1);
      this.brackets.length = 0;  // no link is in another
      this.addAround((nodes) => anchor(address, nodes.length ? nodes : [address]), inner);
    });
    return isLink || this.add("]");
  }

  bareLink() {
    if (/\w/.test(this.text[this.at - 1] ?? " ")) return false;
    ADDRESS.lastIndex = this.at;
    let address = ADDRESS.exec(this.text)?.[0];
    if (!address) return false;
    const isEnd = (char) => ".,:;!?'*_~]|".includes(char) || (char === ")" && !address.includes("("));
    while (isEnd(address.at(-1))) address = address.slice(0, -1);
    this.at += address.length;
    return this.add(anchor(address, [address]), 1);
  }
}

const nodeOf = (item) => item.node ?? item.char.repeat(item.count);

function pairs(opener, closer) {
  if (opener.char !== closer.char) return false;
  if (closer.char === "~") return opener.count === 2 && closer.count === 2;
  const isBoth = (opener.opens && opener.closes) || (closer.opens && closer.closes);
  const isOdd = (opener.length + closer.length) % 3 === 0 && (opener.length % 3 || closer.length % 3);
  return !(isBoth && isOdd);
}

function anchor(address, nodes) {
  const made = element("a", nodes);
  made.href = address;
  made.title = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}
