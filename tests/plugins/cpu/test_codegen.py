"""The C++ that is generated from an operator's spec."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tests.plugins.test_spec import SMALL

from slipstream.plugins import arguments, cpu, native
from slipstream.plugins.cpu.codegen import generate, generate_signatures
from slipstream.plugins.operators import OPERATORS
from slipstream.plugins.spec import OperatorSpec, TensorSpec


def test_the_generated_arguments() -> None:
    text = generate([SMALL])
    assert "#define SLIPSTREAM_OPERATORS(X) X(SmallOp, small_op)\n" in text
    struct = text[text.index("struct SmallOp") : text.index("}  // namespace")]
    assert (
        struct.strip()
        == """struct SmallOpArgs {
  const float* x;  // [tokens, 2*width]: activations
  void* pages;  // any shape: pages
  const float* bias;  // [tokens+1], or null: added
  int32_t* y;  // [tokens, width//(1+layer)]: the result
  ElementType pages_type;  // of pages
  int64_t pages_size;  // elements of pages
  int64_t tokens;  // axis 0 of x
  int64_t width;  // columns
  int64_t layer;  // which
  float eps;  // tiny
};

// What is wrong with them, or null: the operator's own look at its arguments.
const char* check(const SmallOpArgs&);"""
    )


def test_the_generated_signature() -> None:
    text = generate_signatures([SMALL])
    struct = text[text.index("struct SmallOp") : text.index("using Signatures")]
    assert (
        struct.strip()
        == """struct SmallOpSignature {
  using Args = SmallOpArgs;
  static constexpr const char* name = "SmallOp";
  static constexpr TensorDeclaration inputs[] = {
    {ElementType::float32, Characteristic::required},
    {ElementType::undefined, Characteristic::required},
    {ElementType::float32, Characteristic::optional},
  };
  static constexpr TensorDeclaration outputs[] = {
    {ElementType::int32, Characteristic::required},
  };
  static auto kernel(const Kernels& kernels) { return kernels.small_op; }

  static void attributes([[maybe_unused]] const Node& node, [[maybe_unused]] Args& args) {
    args.width = node.int_attribute("width", 1ll, 4096ll);
    args.layer = node.int_attribute("layer", -2147483648ll, 2147483647ll, 0);
    args.eps = node.float_attribute("eps", 1e-06);
  }

  static void fill(const Call& call, Args& args) {
    const Tensor x = call.required(0, "x", 2);
    args.x = x.as<const float>();
    const Tensor pages = call.required(1, "pages", 0);
    args.pages = pages.as<void>();
    call.expect_type(pages, "pages", {ElementType::float32, ElementType::int8}, "float32 or int8");
    args.pages_type = pages.type;
    args.pages_size = pages.elements();
    const Tensor bias = call.optional(2, "bias", 1);
    args.bias = bias.as<const float>();
    args.tokens = x.shape[0];
    call.expect_shape(x, "x", {args.tokens, multiply(2, args.width)}, "[tokens, 2*width]");
    call.expect_shape(bias, "bias", {add(args.tokens, 1)}, "[tokens+1]");
  }

  // Whether there is anything to compute.
  static bool make_outputs(const Call& call, Args& args) {
    bool any = false;
    args.y = call.output<int32_t>(0, {args.tokens, divide(args.width, add(1, args.layer))}, any);
    return any;
  }
};"""
    )


def test_ctypes_and_the_compiler_lay_the_arguments_out_alike(tmp_path: Path) -> None:
    """Every member of every operator at the same place."""
    specs = [spec for spec in OPERATORS.values() if spec.native]
    checks = ["#include <cstddef>", '#include "operators.h"', "using namespace slipstream;"]
    for spec in specs:
        mirror = native.arguments_type(spec)
        checks.append(f"static_assert(sizeof({spec.name}Args) == {ctypes.sizeof(mirror)});")
        for field in arguments.fields(spec):
            offset = getattr(mirror, field.name).offset
            checks.append(f"static_assert(offsetof({spec.name}Args, {field.name}) == {offset});")
    compile_header(tmp_path, specs, checks)


def test_the_generated_headers_compile(tmp_path: Path) -> None:
    compile_header(tmp_path, [SMALL], ['#include "signatures.h"'])


def compile_header(folder: Path, specs: list[OperatorSpec], lines: list[str]) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    (folder / "operators.h").write_text(generate(specs))
    (folder / "signatures.h").write_text(generate_signatures(specs))
    (folder / "check.cpp").write_text("\n".join(lines))
    plugins = Path(cpu.__path__[0]).parent
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{folder}", f"-I{plugins}", str(folder / "check.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_size_that_nothing_gives_is_a_defect_of_the_spec() -> None:
    inputs = (TensorSpec("x", ("float32",), ("2*width",), "x"),)
    spec = replace(SMALL, inputs=inputs, outputs=(), attributes=())
    with pytest.raises(ValueError, match=r"SmallOp: width, in the shape of x, is neither"):
        generate([spec])
