"""The list of kernels in a builder's log."""

from engines.layers import report_from_log


def tensor(name: str, dtype: str, dimensions: str = "[1,-1,1024]") -> str:
    return f"{{ Name: {name}, Dimensions: {dimensions}, Strides: [1], Datatype: {dtype}, Format: (Linear) Row major }}"


def layer(name: str, kind: str, *inputs: str) -> str:
    return f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)}], Constants: [], Outputs: [], StreamId: 0"


# As tensorrt_rtx 1.7.1 writes them; a second profile repeats every kernel with its number in the names of the graph.
LOG = "\n".join(
    [
        "Layers:",
        layer("entry^bb^signal^1_myl0_1", "signal"),
        layer("__myl_Cast_myl0_3", "kgen", tensor("latents", "Float")),
        layer("node_a_myl0_4", "gemm", tensor("x.1_myl0", "FP8"), tensor("block.a.weight", "FP8", "[1024,3072]")),
        layer("_gemm_mha_v2_myl0_5", "kgen", tensor("q", "BFloat16"), tensor("k", "BFloat16")),
        layer("node_b_myl0_6", "gemm", tensor("y_myl0", "FP8"), tensor("block.b.weight", "FP8")),
        layer("__myl_Cast_myl1_3", "kgen", tensor("latents [profile 1]", "Float")),
        layer("node_a [profile 1]_myl1_4", "gemm", tensor("x_1", "FP8"), tensor("block.a.weight [profile 1]", "FP8")),
        layer("node_b [profile 1]_myl1_6", "gemm", tensor("y_myl1", "BFloat16"), tensor("z_myl1", "BFloat16")),
        layer("dequantize_myl1_5", "kgen", tensor("block.b.weight [profile 1]", "FP8")),
    ]
)


def test_kernels_are_counted_by_profile_and_type() -> None:
    report = report_from_log(["Max Scratch Memory: 690268160 bytes", LOG, "Max Scratch Memory: 5 bytes"])
    assert report.to_dict() == {
        "profiles": [
            {
                "gemms": {"FP8": 2},
                "fused_attentions": {"BFloat16": 1},
                "fused_int4": 0,
                "kinds": {"kgen": 2, "gemm": 2},
                "kernels": 4,
            },
            {
                "gemms": {"FP8": 1, "BFloat16": 1},
                "fused_attentions": {},
                "fused_int4": 0,
                "kinds": {"kgen": 2, "gemm": 2},
                "kernels": 4,
            },
        ],
        "scratch_bytes": 690268160,
    }


def test_a_product_in_another_format_is_missing() -> None:
    first, second = report_from_log([LOG]).profiles
    assert first.missing(["node_a", "node_b"], "FP8") == []
    assert second.missing(["node_a", "node_b"], "FP8") == ["node_b"]
    assert first.missing(["node_a"], "FP4E2M1+FP8") == ["node_a"]


def test_products_that_became_one_kernel_are_all_there() -> None:
    merged = layer("node_v+node_k+node_q_myl0_4", "gemm", tensor("x", "FP8"), tensor("w", "FP8"))
    (profile,) = report_from_log([f"Layers:\n{merged}"]).profiles
    assert profile.missing(["node_q", "node_k", "node_v", "node_o"], "FP8") == ["node_o"]


def test_a_log_without_a_list_has_no_profiles() -> None:
    assert report_from_log(["Building engine"]).profiles == ()
