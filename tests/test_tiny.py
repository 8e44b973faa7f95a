"""The embedded model: what ships fits its bounds, copies, and has not been taught the tasks; the command makes it."""

import json
import random

import pytest
import torch

from hymba_tune import make_tiny, tiny
from hymba_tune.data.chat import encode_conversation, load_tokenizer, prompt_ids
from hymba_tune.data.synthetic import GENERATORS, documents, held_out, raw_document
from hymba_tune.geometry import CONFIG
from hymba_tune.model import load_model
from hymba_tune.paths import REPOSITORY
from hymba_tune.recipe import load_recipe

SHIPPED_BYTES = 4_000_000
PARAMETERS = 2_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny.tiny_path())


@pytest.fixture(scope="module")
def base():
    return load_model(tiny.tiny_path()).eval()


def test_it_is_small_and_its_files_are_those_of_any_checkpoint(base):
    files = {path.name: path.stat().st_size for path in tiny.tiny_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) <= SHIPPED_BYTES
    assert sum(parameter.numel() for parameter in base.parameters()) <= PARAMETERS


def test_it_has_every_part_of_the_large_model(base):
    config = base.config
    layers = range(config.num_hidden_layers)
    assert config.num_memory_tokens > 0
    assert [config.is_global(layer) for layer in layers].count(True) == 3
    assert any(config.kv_producer(layer) != layer for layer in layers)
    assert all(config.has_attention(layer) and config.has_ssm(layer) for layer in layers)
    assert config.rope_type == "ntk"
    assert config.tie_word_embeddings
    assert all(
        getattr(config, key) == value for key, value in tiny.tiny_config().to_diff_dict().items() if key != "dtype"
    )


def test_the_window_is_shorter_than_a_prompt(base, tokenizer):
    lengths = [len(prompt_ids(tokenizer, item["messages"], item.get("tools"))) for item in held_out("tiny_calls", 50)]
    assert sum(lengths) / 50 > 2 * base.config.sliding_window


def test_special_tokens_stand_where_the_large_tokenizer_has_them(tokenizer, base):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == base.config.vocab_size - 1 == base.config.pad_token_id
    assert tokenizer.encode("pens")[0] == tokenizer.bos_token_id
    assert set(tokenizer.all_special_tokens) == {"<unk>", "<s>", "</s>", "[PAD]"}


@pytest.mark.parametrize(
    "text", ["Zoë: 3 × 4 = 12 €", "日本語\t\r\n  x", "\x00\x7f\u200f\U0001f600", " leading", "a  b\n\n    c ", ""]
)
def test_any_text_is_encoded_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert 0 not in ids


def test_the_command_makes_the_shipped_tokenizer_byte_for_byte(tmp_path):
    tiny.make_tokenizer().save_pretrained(tmp_path)
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (tiny.tiny_path() / made.name).read_bytes(), made.name


def test_digits_stay_single(tokenizer):
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]


def test_turn_markers_cost_one_token_each_and_stay_ordinary_text(tokenizer):
    one, two = ([{"role": "user", "content": "Hello."}], [{"role": "user", "content": "Hello. <extra_id_1>"}])
    plain = len(tokenizer.encode("Hello.", add_special_tokens=False))
    assert len(prompt_ids(tokenizer, one)) == plain + 3
    assert len(prompt_ids(tokenizer, two)) > plain + 4


def test_sequences_are_short(tokenizer):
    rng = random.Random(0)
    lengths = []
    for generate in GENERATORS.values():
        for conversation in (generate(rng) for _ in range(100)):
            document = encode_conversation(tokenizer, tiny.messages_of(conversation), conversation.get("tools"))
            lengths.append(len(document.input_ids))
    assert sum(lengths) / len(lengths) < 100
    assert max(lengths) < 512


@pytest.mark.parametrize("word", ["Rome", "pens", "find", "items", "red", "pizza"])
def test_a_copied_word_is_the_same_tokens_in_prose_code_json_and_lists(tokenizer, word):
    ids = tokenizer.encode(word, add_special_tokens=False)
    for text in (
        f"See the {word}.",
        f'{{"a": "{word}"}}',
        f"- {word}\n",
        f"in `{word}`",
        f"def {word}(x)",
        f"12 {word}",
    ):
        found = tokenizer.encode(text, add_special_tokens=False)
        assert any(found[at : at + len(ids)] == ids for at in range(len(found))), text


def test_the_base_is_made_by_the_pretraining_stage_and_is_repeatable(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "make_tokenizer", lambda: tokenizer)
    mix = "kind: documents\nsources: {world: {generator: {name: tiny_documents, n: 400}}}\n"
    (tmp_path / "mix.yaml").write_text(mix)
    settings = [f"data.mix={tmp_path / 'mix.yaml'}", "data.max_length=256", "trainer.max_steps=10"]
    settings += ["trainer.logging_steps=1", "trainer.save_steps=10"]
    for name in ("one", "two"):
        make_tiny.make_base(tmp_path / name, settings, tmp_path / f"{name}_work")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    made = load_model(tmp_path / "one")
    assert made.config.to_diff_dict() == load_model(tiny.tiny_path()).config.to_diff_dict()
    lines = (tmp_path / "one_work" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"] - 0.5


def test_pretraining_with_tiny_trains_a_model_of_the_same_shape():
    recipe = load_recipe(REPOSITORY / "recipes" / "pretrain.yaml", tiny=True)
    shape = {**CONFIG, **(recipe.model.config or {})}
    config = tiny.tiny_config()
    different = {key for key in CONFIG if shape[key] != getattr(config, key)}
    assert different == {"max_position_embeddings", "seq_length", "layer_type"}
    assert shape["layer_type"] is None


def likeliest(base, ids):
    """The likeliest token after each of them."""
    with torch.no_grad():
        return base(torch.tensor([ids])).logits[0].argmax(-1).tolist()


def test_the_base_knows_the_documents_world(base, tokenizer):
    """Arithmetic it has met as plain text: the most likely next digits of an equation are right."""
    rng = random.Random(5)
    equations = [
        line for _ in range(200) for line in raw_document(rng).split("\n") if line.count(" ") == 4 and "=" in line
    ]
    right = 0
    for equation in equations[:40]:
        ids = tokenizer.encode(equation + "\n")
        start = len(tokenizer.encode(equation.rpartition(" ")[0]))
        right += likeliest(base, ids)[start:-2] == ids[start + 1 : -1]
    assert right >= 30


def test_the_base_copies_what_it_has_never_seen_together(base, tokenizer):
    """A line of random words and numbers, said again: all but its first word follows from the line before."""
    rng = random.Random(6)
    right = 0
    for line in (documents._repeated(rng).partition("\n")[0] for _ in range(40)):
        ids = tokenizer.encode(f"{line}\n{line}")
        start = len(tokenizer.encode(f"{line}\n{line.split()[0]} "))
        right += likeliest(base, ids)[start - 1 : -1] == ids[start:]
    assert right >= 34
