"""Skeletons on the meta device with values read from files or drawn equal what transformers itself loads and draws."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, set_seed

from shardtune.errors import ConfigError
from shardtune.model.initialization import CHUNK
from shardtune.model.skeleton import Skeleton, build_skeleton, load_architecture
from shardtune.model.tokenizer import fit_config, identity, load_tokenizer, train_tokenizer
from shardtune.task.architecture import decoder_start
from skeletons import CLASSES, ENCODERS, MODELS, TASKS, architecture, filled, logits, saved, skeleton_of, values
from tiny import rows


def assert_same(ours: dict[str, Tensor], theirs: nn.Module, but: list[str]) -> None:
    wanted = dict(theirs.named_parameters())
    assert set(ours) == set(wanted)
    for name, value in ours.items():
        if name not in but:
            # transformers widens some of T5's to float32 where files are float16.
            assert value.dtype == wanted[name].dtype or value.dtype == torch.float16, name
            assert torch.equal(value.to(wanted[name].dtype), wanted[name]), name


def assert_loads_like_transformers(folder: Path, task: str, head: bool = False) -> Skeleton:
    skeleton = skeleton_of(folder, task)
    theirs = CLASSES[task].from_pretrained(folder, dtype="auto")
    assert type(skeleton.model) is type(theirs)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert bool(skeleton.new_parameters) == head, skeleton.new_parameters
    assert_same(values(skeleton), theirs, skeleton.new_parameters)
    buffers = dict(skeleton.model.named_buffers())
    assert set(buffers) == {name for name, _ in theirs.named_buffers()}
    for name, buffer in theirs.named_buffers():
        # The values are exact; transformers also rounds some to the files' dtype, where ours stay whole.
        assert torch.equal(buffers[name].to(buffer.dtype), buffer), name
    return skeleton


# --------------------------------------------------------------------------------------------- pretrained


@pytest.mark.parametrize("name", MODELS)
def test_saved_models(tmp_path: Path, name: str) -> None:
    skeleton = assert_loads_like_transformers(saved(tmp_path, name), TASKS[name])
    assert skeleton.stored_dtype == torch.float32


@pytest.mark.parametrize("name", ["t5-untied", "llama", "gpt2", "bert"])
def test_sharded_files(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name, shards="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_loads_like_transformers(folder, TASKS[name])


@pytest.mark.parametrize("name", ["t5", "llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    skeleton = assert_loads_like_transformers(saved(tmp_path, name, dtype=dtype), TASKS[name])
    assert skeleton.stored_dtype == dtype
    assert {p.dtype for p in skeleton.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "auto"),
    [(name, AutoModel) for name in (*ENCODERS, "llama", "gpt2", "qwen3", "mistral")]
    + [(name, AutoModelForMaskedLM) for name in ENCODERS]
    + [(name, AutoModelForCausalLM) for name in ("llama", "gpt2")],
)
def test_new_heads(tmp_path: Path, name: str, auto: Any) -> None:
    """Checkpoints without the prefix, or with another head, into a classification head that is drawn."""
    folder = saved(tmp_path, name, auto, pad_token_id=0)
    skeleton = assert_loads_like_transformers(folder, "classification", head=True)
    heads = {new.partition(".")[0] for new in skeleton.new_parameters} - {"bert"}
    assert heads <= {"classifier", "pre_classifier", "score"}
    drawn = values(skeleton, seed=1)
    assert all(drawn[new].isfinite().all() for new in skeleton.new_parameters)
    last = [new for new in skeleton.new_parameters if new.endswith("weight")][-1]
    assert not torch.equal(drawn[last], values(skeleton, seed=2)[last])


@pytest.mark.parametrize(("name", "auto"), [("gpt2", AutoModel), ("t5", AutoModel), ("bart", AutoModel)])
def test_files_without_the_tied_head(tmp_path: Path, name: str, auto: Any) -> None:
    """As the first GPT-2 and BART on the hub are."""
    assert_loads_like_transformers(saved(tmp_path, name, auto), TASKS[name])


@pytest.mark.parametrize("name", ["t5", "t5-untied", "gpt2", "llama-tied"])
def test_output_layers_of_their_own(tmp_path: Path, name: str) -> None:
    """Flan-T5's files have one, though the config of transformers says that it is tied; it stays apart."""
    folder = saved(tmp_path / "model", name)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embeddings = next(tensor for key, tensor in tensors.items() if tensor.shape[0] == 400)
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, file, metadata={"format": "pt"})
    tied = assert_loads_like_transformers(folder, TASKS[name]).model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight  # pyright: ignore

    save_file({**tensors, "lm_head.weight": torch.randn(400, 32)}, file, metadata={"format": "pt"})
    skeleton = assert_loads_like_transformers(folder, TASKS[name])
    ours, theirs = filled(skeleton), CLASSES[TASKS[name]].from_pretrained(folder)
    assert ours.get_output_embeddings().weight is not ours.get_input_embeddings().weight
    assert torch.equal(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(CLASSES[TASKS[name]].from_pretrained(tmp_path / "again")), logits(theirs))
    grown = skeleton_of(folder, TASKS[name], change=lambda config: setattr(config, "vocab_size", 410))
    assert values(grown)["lm_head.weight"].shape == (410, 32)


def test_old_names(tmp_path: Path) -> None:
    """The first BERT files call the norms' parameters gamma and beta."""
    folder = saved(tmp_path, "bert")
    file = folder / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    assert_loads_like_transformers(folder, "classification")


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_forward_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    ours = filled(skeleton_of(folder, TASKS[name]))
    theirs = CLASSES[TASKS[name]].from_pretrained(folder)
    assert torch.equal(logits(ours), logits(theirs))
    if name == "t5":
        assert ours.lm_head.weight is ours.shared.weight


# ------------------------------------------------------------------------------------------------- random


@pytest.mark.parametrize("name", MODELS)
def test_random_weights_are_like_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = architecture(tmp_path, name)
    skeleton = skeleton_of(folder, TASKS[name], pretrained=False)
    assert not skeleton.new_parameters
    ours = values(skeleton)
    set_seed(0)
    theirs = dict(CLASSES[TASKS[name]].from_config(AutoConfig.from_pretrained(folder)).named_parameters())
    assert set(ours) == set(theirs)
    compared = 0
    for parameter, value in ours.items():
        wanted = theirs[parameter].detach()
        if wanted.dim() > 1:
            assert torch.equal((value == 0).all(1), (wanted == 0).all(1)), f"{parameter}: the padding's row"
        if wanted.std() == 0:
            assert torch.equal(value, wanted), parameter
        elif value.numel() >= 500:
            # A sample's standard deviation strays by about 1 / sqrt(2 n); five times that, of both samples.
            assert value.std().item() == pytest.approx(wanted.std().item(), rel=5 / value.numel() ** 0.5), parameter
            assert abs(value.mean()) < 5 * wanted.std() / value.numel() ** 0.5, parameter
            compared += 1
    assert compared >= 5
    random_ones = [parameter for parameter, value in ours.items() if value.std() > 0]
    for index, parameter in enumerate(random_ones[1:]):
        other = ours[random_ones[index]]
        assert not torch.equal(ours[parameter].flatten()[:50], other.flatten()[:50]), "each has numbers of its own"


def test_random_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    folder = architecture(tmp_path, "t5")
    first = values(skeleton_of(folder, "seq2seq", pretrained=False), seed=3)
    set_seed(99)  # of no influence
    again = values(skeleton_of(folder, "seq2seq", pretrained=False), seed=3)
    other = values(skeleton_of(folder, "seq2seq", pretrained=False), seed=4)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert value.std() == 0 or not torch.equal(value, other[name]), name
    # Parts of what a seed means: they may not change from one version to the next.
    assert first["shared.weight"].flatten()[:3].tolist() == pytest.approx(PINNED, abs=1e-4)


PINNED = [0.42591, 2.03034, 0.20272]


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
def test_random_weights_do_not_depend_on_the_layout(tmp_path: Path, name: str) -> None:
    """Any range is the slice of the whole, also across the chunks that share a seed."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    wide = {"vocab_size": 5000}  # 160,000 elements: more than two chunks
    skeleton = skeleton_of(architecture(tmp_path, name, **wide), TASKS[name], pretrained=False)
    weights = skeleton.weights(skeleton.model, 7, torch.float32)
    for parameter, meta in skeleton.model.named_parameters():
        whole = weights.read(parameter, 0, meta.numel())
        assert whole.dtype == torch.float32
        edges = [0, 1, meta.numel() - 1, meta.numel(), *(CHUNK * k + d for k in (1, 2) for d in (-1, 0, 1))]
        for _ in range(20 if meta.numel() > CHUNK else 4):
            start, stop = sorted(
                min(rng.choice([rng.randrange(meta.numel() + 1), rng.choice(edges)]), meta.numel()) for _ in range(2)
            )
            assert torch.equal(weights.read(parameter, start, stop), whole[start:stop]), (parameter, start, stop)


# ------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    ("name", "count", "layers", "stacks"),
    [
        ("t5", {"num_layers": 5, "num_decoder_layers": 5}, [0, 2, 3], ["encoder.block", "decoder.block"]),
        ("bart", {"encoder_layers": 4, "decoder_layers": 4}, [1, 3], ["model.encoder.layers", "model.decoder.layers"]),
        ("llama", {"num_hidden_layers": 5}, [1, 4], ["model.layers"]),
        ("qwen3", {"num_hidden_layers": 3}, [2], ["model.layers"]),
        ("gpt2", {"n_layer": 4}, [0, 3], ["transformer.h"]),
        ("bert", {"num_hidden_layers": 12}, [0, 10, 11], ["bert.encoder.layer"]),
    ],
)
def test_kept_layers(
    tmp_path: Path, name: str, count: dict[str, int], layers: list[int], stacks: list[str], pretrained: bool
) -> None:
    folder = saved(tmp_path, name, **count)
    cut: Any = CLASSES[TASKS[name]].from_pretrained(folder)
    for stack in stacks:
        parent = cut.get_submodule(stack.rpartition(".")[0])
        setattr(parent, stack.rpartition(".")[2], nn.ModuleList([cut.get_submodule(stack)[layer] for layer in layers]))
    skeleton = skeleton_of(folder, TASKS[name], pretrained, layers)
    if not pretrained:
        assert set(values(skeleton)) == {name for name, _ in cut.named_parameters()}
        return
    assert_same(values(skeleton), cut, [])
    assert torch.equal(logits(filled(skeleton)), logits(cut))


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("t5", [0, 2], "model.layers: 2 is not there; the model has layers 0 to 1"),
        ("t5", [1], "model.layers: must begin with 0, which holds the position biases"),
        ("llama", [7], "model.layers: 7 is not there; the model has layers 0 to 1"),
        ("gpt2", [0, 1, 2], "model.layers: 2 is not there"),
    ],
)
def test_layers_that_are_not_there(tmp_path: Path, name: str, layers: list[int], message: str) -> None:
    folder = architecture(tmp_path, name)
    with pytest.raises(ConfigError, match=message):
        skeleton_of(folder, TASKS[name], pretrained=False, layers=layers)


# --------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("name", ["t5", "t5-untied", "llama", "gpt2", "bart"])
def test_a_vocabulary_that_has_grown(tmp_path: Path, name: str) -> None:
    """Rows of the files stay bit for bit; new ones are drawn, seeded, whatever range is asked for."""
    folder = saved(tmp_path, name)
    old = values(skeleton_of(folder, TASKS[name]))
    skeleton = skeleton_of(folder, TASKS[name], change=lambda config: setattr(config, "vocab_size", 417))
    weights = skeleton.weights(skeleton.model, 5, torch.float32)
    grown = 0
    for parameter, meta in skeleton.model.named_parameters():
        value = weights.read(parameter, 0, meta.numel()).view(meta.shape)
        if value.shape == old[parameter].shape:
            assert torch.equal(value, old[parameter])
            continue
        grown += 1
        assert value.shape == (417, 32)
        assert torch.equal(value[:400], old[parameter])
        assert value[400:].isfinite().all()
        assert (value[400:].std(1) > 0).all()
        flat = value.flatten()
        for start, stop in ((12_790, 12_810), (12_800, 13_000), (0, 13_344), (12_799, 12_800)):
            assert torch.equal(weights.read(parameter, start, stop), flat[start:stop])
    assert grown == (2 if name == "llama" else 1)


def test_files_of_another_shape(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    skeleton = skeleton_of(folder, "causal", change=lambda config: setattr(config, "vocab_size", 300))
    with pytest.raises(
        ConfigError, match=r"embed_tokens.weight has shape \[400, 32\], the model's config says \[300, 32\]"
    ):
        skeleton.weights(skeleton.model, 0, torch.float32)
    skeleton = skeleton_of(folder, "causal", change=lambda config: setattr(config, "intermediate_size", 96))
    with pytest.raises(ConfigError, match=r"has shape \[\d+, \d+\], the model's config says"):
        skeleton.weights(skeleton.model, 0, torch.float32)


# --------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [value for row in rows(400, seed=3) for value in (row["text"], row["summary"])] + [
        f"Überraschung {n} 漢字 🙂 naïve café №{n}" + " words-and_punctuation, (more); " * 3 + str(n**5)
        for n in range(300)
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["seq2seq", "causal", "classification"])
@pytest.mark.parametrize("pieces", [300, 400])
def test_trained_tokenizer(tmp_path: Path, texts: list[str], task: str, pieces: int) -> None:
    train_tokenizer(iter(texts), pieces, task, tmp_path / "one")
    train_tokenizer(iter(texts), pieces, task, tmp_path / "two")
    tokenizer: Any = load_tokenizer(str(tmp_path / "one"), "right", False)
    assert len(tokenizer) == pieces
    assert identity(tokenizer) == identity(load_tokenizer(str(tmp_path / "two"), "right", False))
    assert identity(tokenizer) != identity(load_tokenizer(str(tmp_path / "two"), "left", False))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    plain = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    wanted = {"seq2seq": [*plain, 1], "causal": plain, "classification": [2, *plain, 1]}[task]
    assert tokenizer("a cat")["input_ids"] == wanted
    assert tokenizer("")["input_ids"] == [token for token in wanted if token in (1, 2)]


def test_any_text_survives_a_trained_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    train_tokenizer(texts, 400, "seq2seq", tmp_path)
    tokenizer: Any = load_tokenizer(str(tmp_path), "right", False)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    tried = ["", " ", "  a  b ", "\n\t\r\0", "a\u0301", "\u200d", "\ufeff", " ."]
    tried += ["".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randint(1, 30))) for _ in range(300)]
    for text in tried:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text, ascii(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, ascii(text)


def test_a_small_text_gives_fewer_pieces(tmp_path: Path) -> None:
    train_tokenizer(["a cat"], 1000, "causal", tmp_path)
    assert 260 <= len(load_tokenizer(str(tmp_path), "right", False)) < 300


@pytest.mark.parametrize(
    ("name", "old", "start", "forced_end"),
    [("t5", {}, 0, None), ("bart", {}, 1, 1), ("gpt2", {}, None, None),
     ("bart", {"decoder_start_token_id": 0}, 2, 1)],
)  # fmt: skip
def test_roles_of_special_tokens(
    tmp_path: Path, texts: list[str], name: str, old: dict[str, int], start: int | None, forced_end: int | None
) -> None:
    """T5 starts its decoder with the padding, BART with the end (or here, with the begin) token: of the new ones."""
    train_tokenizer(texts, 300, TASKS[name], tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), "right", False)
    config = load_architecture(str(architecture(tmp_path, name, **old)), TASKS[name], False)
    fit_config(config, tokenizer, newly_trained=True)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)
    assert config.vocab_size == 300
    assert getattr(config, "forced_eos_token_id", None) == forced_end
    if start is not None:
        assert decoder_start(config, "x") == start
    skeleton = build_skeleton(config, "x", TASKS[name], False, "auto", None, False)
    for key, value in (("pad_token_id", 0), ("eos_token_id", 1), ("decoder_start_token_id", start)):
        assert getattr(skeleton.model.generation_config, key) == value, key


def test_a_given_tokenizer_leaves_the_roles(tmp_path: Path, texts: list[str]) -> None:
    train_tokenizer(texts, 420, "seq2seq", tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), "right", False)
    config = load_architecture(str(architecture(tmp_path / "bart", "bart")), "seq2seq", False)
    fit_config(config, tokenizer, newly_trained=False)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (1, 2, 2)
    assert config.vocab_size == 420
    config = load_architecture(str(architecture(tmp_path / "llama", "llama", vocab_size=1000)), "causal", False)
    fit_config(config, tokenizer, newly_trained=False)
    assert config.vocab_size == 1000, "a vocabulary never shrinks"
    assert config.pad_token_id == 0


def test_no_decoder_start(tmp_path: Path) -> None:
    config = load_architecture(str(architecture(tmp_path, "t5")), "seq2seq", False)
    config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match="has no decoder_start_token_id"):
        decoder_start(config, "x")


def test_no_tokenizer(tmp_path: Path) -> None:
    architecture(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded from there: .*train one with train:8000"):
        load_tokenizer(str(tmp_path), "right", False)


def test_end_and_padding_tokens_are_found(tmp_path: Path, texts: list[str]) -> None:
    train_tokenizer(texts, 300, "causal", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def loaded(**changes: Any) -> Any:
        kept = {key: value for key, value in {**settings, **changes}.items() if value is not None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
        (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
        return load_tokenizer(str(tmp_path), "left", False)

    assert loaded().truncation_side == "left"
    without_padding = loaded(pad_token=None)
    assert without_padding.pad_token_id == without_padding.eos_token_id == 1
    assert loaded(eos_token=None, sep_token="<s>").eos_token_id == 2
    with pytest.raises(ConfigError, match="has no end token"):
        loaded(eos_token=None)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("t5", "causal", "a t5 model does not fit task.kind: causal; it fits task.kind: seq2seq or classification. "
                         "For causal take a decoder such as llama, qwen3, mistral or gpt2"),
        ("llama", "seq2seq", "a llama model does not fit task.kind: seq2seq; it fits task.kind: causal, "
                             "classification, token_classification or question_answering. For seq2seq "
                             "take an encoder-decoder such as t5 or bart"),
        ("bert", "causal", "a bert model does not fit task.kind: causal; it fits task.kind: classification, "
                           "token_classification or question_answering. "),
        ("bart", "causal", "it fits task.kind: seq2seq or classification"),
        ("distilbert", "seq2seq", "it fits task.kind: classification"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_the_task(tmp_path: Path, name: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_architecture(str(architecture(tmp_path, name)), task, False)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_models_that_fit_no_task(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match=r"a vit model does not fit task.kind: seq2seq; it fits no task here"):
        load_architecture(str(tmp_path), "seq2seq", False)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "nosuch"}', "[]", '"x"', '{"model_type": 3}', "\xff"])
def test_configs_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"model.path .*: no model can be loaded from there"):
        load_architecture(str(tmp_path), "causal", False)


def test_no_weights(tmp_path: Path) -> None:
    folder = architecture(tmp_path, "t5")
    with pytest.raises(ConfigError, match=r"no model.safetensors \(or set model.weights: random\)"):
        skeleton_of(folder, "seq2seq")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = architecture(tmp_path, "t5")
    mark = tmp_path / "mark"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.")
    with pytest.raises(ConfigError, match=r"only pytorch_model.bin, a pickle, which is never read"):
        skeleton_of(folder, "seq2seq")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "inner/model.safetensors", ".."])
def test_an_index_that_points_elsewhere(tmp_path: Path, name: str) -> None:
    folder = architecture(tmp_path / "model", "t5")
    save_file({"shared.weight": torch.zeros(400, 32)}, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"shared.weight": name}}))
    with pytest.raises(ConfigError, match=r"index.json: (names files outside its own folder|.*missing)"):
        skeleton_of(folder, "seq2seq")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    folder = architecture(tmp_path, "t5")
    (folder / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"index\.json"):
        skeleton_of(folder, "seq2seq")


def test_missing_shards_and_missing_parameters(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "llama", shards="40KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ConfigError, match=f"{lost.name} missing in"):
        skeleton_of(folder, "causal")
    folder = saved(tmp_path / "b", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lack 1 of the model's parameters, such as model.layers.1.mlp.up_proj.weight"
    ):
        skeleton_of(folder, "causal")


def test_damaged_files(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for size in (0, 4, 8, 100, 8 + length, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"not a whole safetensors file|is it cut off\?"):
            skeleton_of(folder, "causal")
    for damage in (b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:], whole[:8] + b"\xff" * 20 + whole[28:]):
        file.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"not a whole safetensors file|its header is damaged"):
            skeleton_of(folder, "causal")
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(60):  # any byte of the header: refused, or still readable
        at = 8 + rng.randrange(length)
        file.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        with contextlib.suppress(ConfigError):
            values(skeleton_of(folder, "causal"))


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    skeleton = skeleton_of(folder, "causal")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"ends before byte \d+; the file is cut off"):
        values(skeleton)


def test_dtypes_that_cannot_be_tuned(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="has dtype F8_E4M3, which cannot be used"):
        skeleton_of(folder, "causal")


def test_attention_that_a_model_does_not_have(tmp_path: Path) -> None:
    folder = architecture(tmp_path, "t5")
    config = load_architecture(str(folder), "seq2seq", False)
    with pytest.raises(ConfigError, match="model "):
        build_skeleton(config, str(folder), "seq2seq", False, "flash_attention_2", None, False)


def test_dropout_of_an_architecture() -> None:
    """Of its parts too; whole layers are left out by other rates, which only a 0 changes."""
    from transformers import BartConfig, EncoderDecoderConfig, T5Config

    from shardtune.model.skeleton import set_dropout

    config = BartConfig(dropout=0.1, attention_dropout=0.2, encoder_layerdrop=0.3, classifier_dropout=0.4)
    set_dropout(config, 0.25)
    assert (config.dropout, config.attention_dropout, config.classifier_dropout) == (0.25, 0.25, 0.25)
    assert config.encoder_layerdrop == 0.3
    set_dropout(config, 0.0)
    assert (config.dropout, config.encoder_layerdrop) == (0.0, 0.0)
    parts = EncoderDecoderConfig(encoder=T5Config().to_dict(), decoder=BartConfig().to_dict())
    set_dropout(parts, 0.0)
    assert (parts.encoder.dropout_rate, parts.decoder.dropout) == (0.0, 0.0)


def test_dropout_of_a_head_that_the_config_does_not_know(tmp_path: Path) -> None:
    """A decoder that marks words has 0.1 of it where nobody says otherwise."""
    from shardtune.model.skeleton import set_dropout

    config = AutoConfig.from_pretrained(architecture(tmp_path, "llama"))
    set_dropout(config, 0.0, "token_classification")
    model = CLASSES["token_classification"].from_config(config)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.0}
