"""Parameter counts: the published totals, and what ranks of a pipeline hold."""

from __future__ import annotations

import pytest

from asft_nemo.config.schema import ParallelConfig, PeftConfig
from asft_nemo.model import padded_vocab_size, parameter_count
from asft_nemo.planner.parameters import layer_parameters, rank_parameters, rank_tensors
from asft_nemo.planner.published import PUBLISHED, published_spec
from asft_nemo.planner.stages import pipeline_chunks

FULL, LORA = PeftConfig(name="none"), PeftConfig(name="lora", rank=8)

# as the Hugging Face hub counts the tensors of each model
TOTALS = {
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    assert parameter_count(published_spec(name)) == TOTALS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_rank_holds_the_model_and_its_padding(name: str) -> None:
    spec, layout = published_spec(name), ParallelConfig()
    [chunks] = pipeline_chunks(layout, spec.num_layers)
    padding = padded_vocab_size(spec.vocab_size, tp_size=1) - spec.vocab_size
    rows = spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    assert rank_parameters(spec, FULL, chunks, tp_size=1).total == TOTALS[name] + padding * rows


def test_ranks_of_72b_as_megatron_builds_them() -> None:
    """Counted on this project's own model under torch's fake process group, ranks 0, 8, 16 and 24 of 32."""
    spec = published_spec("Qwen/Qwen2.5-72B")
    layout = ParallelConfig(tp_size=8, pp_size=4, vpp_size=5)
    counts = [rank_parameters(spec, FULL, chunks, tp_size=8).total for chunks in pipeline_chunks(layout, 80)]
    assert counts == [2_350_736_384, 2_194_498_560, 2_194_498_560, 2_350_744_576]


@pytest.mark.parametrize("peft", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(tp_size=2, pp_size=4)], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_trained_tensors_are_the_trained_parameters(
    name: str, layout: ParallelConfig, peft: PeftConfig
) -> None:
    spec = published_spec(name)
    for chunks in pipeline_chunks(layout, spec.num_layers):
        counted = rank_parameters(spec, peft, chunks, tp_size=layout.tp_size)
        tensors = rank_tensors(spec, peft, chunks, tp_size=layout.tp_size)
        trained = counted.adapters if peft is LORA else counted.total
        assert sum(numbers * count for numbers, count in tensors) == trained


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        (ParallelConfig(pp_size=4), [[20], [20], [20], [20]]),
        (ParallelConfig(pp_size=4, last_stage_layers=17), [[21], [21], [21], [17]]),
        (ParallelConfig(pp_size=4, first_stage_layers=18, last_stage_layers=18), [[18], [22], [22], [18]]),
        (ParallelConfig(pp_size=2, vpp_size=2, last_stage_layers=36), [[22, 22], [18, 18]]),
        (
            ParallelConfig(pp_size=2, vpp_size=41, account_for_embedding=True, account_for_loss=True),
            [[0] + [1] * 40, [1] * 40 + [0]],
        ),
        (ParallelConfig(pp_size=3, account_for_loss=True), [[27], [27], [26]]),
    ],
)
def test_layers_of_uneven_stages(layout: ParallelConfig, layers: list[list[int]]) -> None:
    chunks = pipeline_chunks(layout, 80)
    assert [[chunk.layers for chunk in rank] for rank in chunks] == layers
    assert [chunk.embedding for rank in chunks for chunk in rank].count(True) == 1
    assert chunks[0][0].embedding
    assert chunks[-1][-1].head


def test_a_tied_head_is_a_copy_only_where_stages_differ() -> None:
    spec = published_spec("Qwen/Qwen2.5-1.5B")
    one = [rank_parameters(spec, FULL, c, tp_size=1) for c in pipeline_chunks(ParallelConfig(), 28)]
    two = [rank_parameters(spec, FULL, c, tp_size=1) for c in pipeline_chunks(ParallelConfig(pp_size=2), 28)]
    assert sum(part.total for part in two) - one[0].total == one[0].embedding
    assert one[0].head == 0


def test_adapters_are_divided_by_tensor_parallelism() -> None:
    spec = published_spec("Qwen/Qwen2.5-7B")
    whole, quarter = (layer_parameters(spec, LORA, size).adapters for size in (1, 4))
    # ranks of A and B of the four fused layers, by hand: 8 x (inputs + outputs)
    sizes = ((3584, 3584 + 2 * 512), (3584, 3584), (3584, 2 * 18944), (18944, 3584))
    assert whole == sum(8 * (inputs + outputs) for inputs, outputs in sizes)
    assert quarter * 4 == whole
