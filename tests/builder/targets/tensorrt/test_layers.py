"""The table of layers, as tensorrt_rtx 1.7.1 logs it."""

from slipstream.builder.targets.tensorrt.layers import count_products, read_layers, unpackers

TABLE = """Layers:
Name: __mye425_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
Name: __myl_CastMulCastFc_myl0_1, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [-1,128], Strides: [128,1], StrideOrder: [1,0], Datatype: BFloat16, Format: (Linear) Row major linear format }, { Name: o_proj.weight.scale, Dimensions: [128], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }, { Name: o_proj.weight.int8, Dimensions: [128,128], Strides: [128,1], StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: y, Dimensions: [-1,128], Strides: [128,1], StrideOrder: [1,0], Datatype: BFloat16, Format: (Linear) Row major linear format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: a]
Name: __myl_Tran_myl0_2, LayerType: kgen, Inputs: [ { Name: w.int8, Dimensions: [512,128], Strides: [128,1], StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: z, Dimensions: [128,512], Strides: [512,1], StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], TacticName: __myl_Tran_0x1, StreamId: 0, Metadata: [ONNX Layer: b]
Name: mlp/Linear/1_myl1_3, LayerType: gemm, Inputs: [ { Name: x [profile 1], Dimensions: [-1,128], Strides: [128,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: y, Dimensions: [-1,128], Strides: [128,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: c]

I/O Tensors:
 Name: x, IOMode: Input, DataType: BFloat16, Dimensions: [-1,128]
"""  # noqa: E501


def test_rows_are_kernels_with_the_types_of_what_they_read() -> None:
    fused, turned, product = read_layers(TABLE)
    assert (fused.kind, fused.profile, fused.inputs) == (
        "runtime_fusion", 0, ("BFloat16", "Float", "Int8"),
    )  # fmt: skip
    assert (turned.kind, turned.outputs) == ("kgen", ("Int8",))
    assert (product.kind, product.profile, product.constants) == ("gemm", 1, ("Float",))


def test_products_are_counted_in_one_profile() -> None:
    assert count_products(read_layers(TABLE)) == {"runtime_fusion Int8": 1}


def test_a_kernel_that_only_turns_codes_is_found() -> None:
    assert [layer.name for layer in unpackers(read_layers(TABLE))] == ["__myl_Tran_myl0_2"]
