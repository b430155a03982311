from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models.files import GraphError, GraphSignature, GraphTensor, read_signature
from tests.graphs import EXPORTED, exported_graph, scale_graph, vad_graph


def signature_by_onnx(content: bytes) -> GraphSignature:
    """What the reference implementation reads."""
    graph = onnx.load_model_from_string(content).graph
    types = {1: "FP32", 7: "INT64"}

    def tensors(values: object) -> tuple[GraphTensor, ...]:
        found = []
        for value in values:  # type: ignore[attr-defined]  # a protobuf container
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            found.append(GraphTensor(value.name, types[kind.elem_type], shape))
        return tuple(found)

    return GraphSignature(tensors(graph.input), tensors(graph.output))


@pytest.mark.parametrize("content", [vad_graph(), scale_graph(2.0), scale_graph(2.0, batch=1)])
def test_a_graph_has_the_inputs_and_outputs_that_onnx_reads(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    assert read_signature(tmp_path / "graph.onnx") == signature_by_onnx(content)


def test_an_input_with_a_default_inside_the_graph_is_none_that_a_request_must_give(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(scale_graph(2.0))
    model.graph.input.append(onnx.helper.make_tensor_value_info("factor", onnx.TensorProto.FLOAT, []))
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    assert [one.name for one in read_signature(tmp_path / "graph.onnx").inputs] == ["x"]


def test_an_axis_of_negative_length_is_free_and_a_name_may_have_any_characters(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(exported_graph(2.0))
    found = read_signature(tmp_path / "graph.onnx")
    assert found == GraphSignature(*((GraphTensor(name, "FP32", (-1, 2)),) for name in EXPORTED.values()))


@given(cut=st.integers(0, len(vad_graph())), junk=st.binary(max_size=12), rest=st.integers(0, len(vad_graph())))
def test_any_other_file_is_refused_or_read(
    cut: int, junk: bytes, rest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.onnx"
    path.write_bytes(vad_graph()[:cut] + junk + vad_graph()[rest:])
    with suppress(GraphError):
        read_signature(path)
