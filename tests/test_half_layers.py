"""Products in float16 between numbers of float32: nothing overflows, and tokens stay those of float32."""

from pathlib import Path

import pytest
import torch
from devices import DEVICE
from gpu_models import OnGPU, load_on_gpu
from lora_files import greedy_tokens
from models import tiny_model
from torch import nn

from engine.checked_model import check_model
from engine.gpu.half_layers import HalfEmbedding, HalfLinear, in_halves
from engine.model_loader import weights_of
from engine.quantization import HALVES, NONE, STOCK


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5, 1e12])
def test_a_product_is_that_of_float32_whatever_the_size_of_its_inputs(size: float) -> None:
    """Also where rows differ much."""
    weight, x = torch.randn(64, 256, device=DEVICE) * 0.05, torch.randn(2, 5, 256, device=DEVICE) * size
    x[0, 1] *= 1e-8
    x[0, 2] = 0.0
    layer = HalfLinear(weight.half(), torch.ones(64, device=DEVICE))
    expected = x @ weight.T
    errors = (layer(x) - 1 - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-3)
    assert float(errors.max()) < 2e-3 and torch.equal(layer(x)[0, 2], torch.ones(64, device=DEVICE))


def test_inputs_may_be_in_float16_already() -> None:
    product = in_halves(torch.zeros(1, 2).half(), lambda rows: rows @ torch.ones(2, 2).half())
    assert product.dtype == torch.float32 and torch.equal(product, torch.zeros(1, 2))


def test_what_is_not_a_number_stays_none() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    product = in_halves(x, lambda rows: rows @ torch.ones(2, 2).half())
    assert product[0].isnan().all() and torch.allclose(product[1], torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_gemma_on_an_older_gpu_has_half_the_weights_and_the_same_tokens(is_tied: bool, tmp_path: Path) -> None:
    tiny_model("gemma3", tie_word_embeddings=is_tied, hidden_size=64).save_pretrained(tmp_path)
    model = load_on_gpu(tmp_path)  # its numbers are in float32, as `choose_dtype` gives them there
    stock = tiny_model("gemma3", "eager", tie_word_embeddings=is_tied, hidden_size=64)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, HalfLinear)]
    assert len(layers) == 7 * model.config.num_hidden_layers + 1
    assert not any(type(layer) is nn.Linear for layer in model.modules())
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HalfEmbedding) == is_tied
    assert not is_tied or embedding.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    model.set_attn_implementation("eager")
    assert greedy_tokens(model, [5, 6, 7, 8], 8) == greedy_tokens(stock.to(DEVICE), [5, 6, 7, 8], 8)


def test_other_weights_stay_as_they_are(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    checked = check_model(tmp_path, "auto", "cpu")
    fields = {name: getattr(checked, name) for name in checked.__dataclass_fields__}
    for changes, setting, expected in [
        ({"dtype": torch.float32}, "auto", HALVES),
        ({"dtype": torch.float32}, STOCK, NONE),
        ({"dtype": torch.float32, "dtype_setting": "float32"}, "auto", NONE),
        ({"dtype": torch.float16}, "auto", NONE),
        ({"dtype": torch.bfloat16}, "auto", NONE),
    ]:
        assert weights_of(OnGPU(**{**fields, **changes}), setting) is expected
