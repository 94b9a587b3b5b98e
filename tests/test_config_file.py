"""Config files: YAML 1.2, overrides, every fault at once with its line and a suggestion, and no false refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from shardtune.aliases import ALIASES
from shardtune.config import Config, MetricName
from shardtune.config_file import dump_config, keys_of, load_config
from shardtune.conflicts import conflicts
from shardtune.errors import ConfigError
from shardtune.task.registry import SECTIONS
from shardtune.task.section import WRITTEN
from shardtune.tuning_config import LoraConfig, TuningConfig

BASE = "model: {path: a/b}\ntask: {kind: seq2seq, source: s, target: t}\ndata: {train: x.jsonl}\n"
TASKS = SECTIONS
SCHEMA = Config.model_json_schema()
METHODS = [section.model_fields["method"].annotation.__args__[0] for section in get_args(get_args(TuningConfig)[0])]
METHOD_NAMES = ", ".join(METHODS)


class File:
    """A config file that is written anew for each reading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, text: str | bytes, *overrides: str) -> Config:
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(self.path, list(overrides))

    def faults(self, text: str | bytes, *overrides: str) -> list[str]:
        """The lines of the refusal, without the file's name."""
        with pytest.raises(ConfigError) as caught:
            self.read(text, *overrides)
        return str(caught.value).replace(str(self.path), "FILE").splitlines()


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "run.yaml")


# ------------------------------------------------------------------------------------------------ YAML 1.2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E-5", 1e-5), ("1.e-5", 1e-5), ("+1.5e-4", 1.5e-4), (".5", 0.5), ("5.", 5.0), ("3", 3),
        ("0x10", 16), ("0o17", 15), ("017", 17), ("2e+2", 200.0),
    ],
)  # fmt: skip
def test_numbers(file: File, text: str, value: float) -> None:
    assert file.read(BASE + f"optimizer: {{weight_decay: {text}}}").optimizer.weight_decay == value
    assert file.read(BASE, f"optimizer.weight_decay={text}").optimizer.weight_decay == value


@pytest.mark.parametrize(
    "text", ["off", "no", "yes", "on", "y", "N", "12:30", "1_000", "2024-01-01", "0b1", "=", "Off"]
)
def test_strings(file: File, text: str) -> None:
    assert file.read(BASE + f"runs: {text}").runs == text
    assert file.read(BASE, f"runs={text}").runs == text


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "false", "False", "FALSE"])
def test_booleans(file: File, text: str) -> None:
    assert file.read(BASE + f"evaluation: {{baseline: {text}}}").evaluation.baseline is (text.lower() == "true")


@pytest.mark.parametrize("text", ["null", "~", "Null", "NULL", ""])
def test_null(file: File, text: str) -> None:
    assert file.read(BASE + f"optimizer:\n  max_grad_norm: {text}\n").optimizer.max_grad_norm is None


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", ".Inf", ".NaN", "1e400"])
def test_numbers_without_end_are_refused(file: File, text: str) -> None:
    assert file.faults(BASE + f"optimizer:\n  lr: {text}") == [
        f"FILE:5 optimizer.lr: should be a finite number, not {float(text.replace('.', '', 1))}"
    ]


def test_off_is_a_value(file: File) -> None:
    assert file.read(BASE + "kernels: {fused: off}").kernels.fused == "off"
    assert file.faults(BASE + "evaluation: {baseline: off}") == [
        "FILE:4 evaluation.baseline: should be a boolean, not 'off'"
    ]


def test_anchors_and_merged_keys(file: File) -> None:
    text = BASE + "evaluation: &often {every: 7}\ncheckpoint: {<<: *often, keep: 2}\ntracking:\n  <<: *often\n"
    config = file.read(text)
    assert (config.evaluation.every, config.checkpoint.every, config.checkpoint.keep, config.tracking.every) == (
        7,
        7,
        2,
        7,
    )
    own = file.read(BASE + "evaluation: &often {every: 7}\ncheckpoint: {<<: *often, every: 3}\n")
    assert own.checkpoint.every == 3
    assert file.faults(BASE + "evaluation: &often {beams: 7}\ncheckpoint:\n  <<: *often\n") == [
        "FILE:5 checkpoint.beams: unknown key; did you mean evaluation.beams?"
    ]


@pytest.mark.parametrize(
    "line", ["seed: 1\nname: n\nseed: 2", "seed: 1\nname: n\nseed: 1", 'seed: 1\nname: n\n"seed": 1']
)
def test_keys_given_twice(file: File, line: str) -> None:
    assert file.faults(BASE + line) == ["FILE:6 seed: this key is given twice"]
    assert file.faults(BASE + "batch:\n  examples: 3\n  examples: 4\n") == [
        "FILE:6 batch.examples: this key is given twice"
    ]


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {}']", "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system", "!!python/module:os", "!!python/object:os.system {{}}", "!!python/tuple [1]",
        "!custom x", "!!int abc", "!!float abc", "!!bool maybe", "!!timestamp abc", "!!binary '?'", "!!omap {{a: 1}}",
        "&x [*x]", "&x {{<<: *x}}", "*nowhere", "[", "'", "{{", "\t3", "a: b", "\0", "\"\\ud800\"",
    ],
)  # fmt: skip
def test_no_tag_is_followed_and_nothing_crashes(file: File, value: str) -> None:
    mark = file.path.with_name("mark")
    value = value.format(mark)
    assert all(line.startswith(("FILE", " ")) for line in file.faults(BASE + f"name: {value}\n"))
    faults = file.faults(BASE, f"name={value}")
    assert len(faults) == 1
    assert faults[0].startswith("command line name")
    assert not mark.exists()


def test_files_that_are_no_config(file: File) -> None:
    missing = ["FILE:1 model: is missing", "FILE:1 task: is missing", "FILE:1 data: is missing"]
    for text in ("", "# a comment\n", "{}"):
        assert file.faults(text) == missing
    for text in ("[]", "3", "off", "- a: b", "---\n"):
        assert file.faults(text) == ["FILE:1: a config is a mapping of keys to values"]
    assert "UTF-8" in file.faults(b"\xff\xfe")[0]
    assert "another document" in file.faults(BASE + "---\n" + BASE)[0]
    assert file.read("\ufeff" + BASE.replace("\n", "\r\n")).model.path == "a/b"


def test_missing_file(file: File) -> None:
    file.path.write_text(BASE)
    with pytest.raises(ConfigError, match=r"rnu.yaml: there is no such config file; did you mean .*run.yaml\?"):
        load_config(file.path.with_name("rnu.yaml"), [])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file.path.parent, [])
    with pytest.raises(ConfigError, match=r"there is no such config file$"):
        load_config(file.path.parent / "none" / "run.yaml", [])


# ---------------------------------------------------------------------------------------------- overrides


def test_overrides(file: File) -> None:
    config = file.read(
        BASE + "optimizer: {lr: 1.0}\n",
        "optimizer.lr=1e-3", "seed=3", "name=a-b", "model.tokenizer=null", "evaluation.metrics=[rouge, bleu]",
        "task.prompt='Summarize: {s}'", "task.source=null", "optimizer.betas=[0.5, 0.6]", "batch={examples: 5}",
        "kernels.fused=off", "data.train=a=b.jsonl", "evaluation.baseline=false", "evaluation.baseline=true",
    )  # fmt: skip
    assert config.optimizer.lr == 1e-3
    assert (config.seed, config.name, config.model.tokenizer) == (3, "a-b", None)
    assert config.evaluation.metrics == ["rouge", "bleu"]
    assert config.optimizer.betas == [0.5, 0.6]
    assert config.batch.examples == 5
    assert config.kernels.fused == "off"
    assert config.data.train == "a=b.jsonl"
    assert config.evaluation.baseline


def test_an_override_with_a_colon_is_quoted(file: File) -> None:
    """As in the file itself: what YAML would read as a mapping needs quotes."""
    assert file.read(BASE, "task.prompt='S: {s}'", "task.source=null").task.model_dump()["prompt"] == "S: {s}"


def test_overrides_make_sections(file: File) -> None:
    config = file.read("", "model.path=a/b", "task.kind=causal", "task.text=t", "data.train=x.jsonl")
    assert isinstance(config.task, SECTIONS["causal"])
    config = file.read(BASE + "optimizer: null\n", "optimizer.lr=3")
    assert config.optimizer.lr == 3
    assert file.faults(BASE, "tuning.rank=3") == ["command line tuning.method: is missing"]
    assert file.faults(BASE, "model.path.x=3") == ["command line model.path: should be a string, not {'x': 3}"]


def test_overrides_replace_duration_and_method(file: File) -> None:
    timed = BASE + "duration: {epochs: 3}\n"
    assert file.read(timed, "duration.steps=7").duration.model_dump(exclude_none=True) == {"steps": 7}
    assert file.read(timed, "duration={steps: 7}").duration.steps == 7
    assert file.read(BASE, "duration.steps=7").duration.steps == 7
    assert "give exactly one" in file.faults(timed, "duration.steps=7", "duration.epochs=1")[0]

    tuned = BASE + "tuning: {method: lora, rank: 3, alpha: 4}\n"
    assert file.read(tuned, "tuning.method=full").tuning.method == "full"
    kept = file.read(tuned, "tuning.method=lora").tuning
    assert isinstance(kept, LoraConfig)
    assert (kept.rank, kept.alpha) == (3, 4)
    freezing = file.read(tuned, "tuning.layers=2", "tuning.method=freeze").tuning
    assert freezing.model_dump(include={"method", "layers"}) == {"method": "freeze", "layers": 2}
    assert "unknown key" in file.faults(tuned, "tuning.rank=2", "tuning.method=full")[0]


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", ".=3", "a.=3", ""])
def test_overrides_without_form(file: File, override: str) -> None:
    faults = file.faults(BASE, override)
    assert faults == [f"command line {override}: an override has the form key.path=value"]


def test_faults_of_overrides_are_on_the_command_line(file: File) -> None:
    text = BASE + "optimizer:\n  lr: 1\n"
    assert file.faults(text, "optimizer.lr=high") == ["command line optimizer.lr: should be a number, not 'high'"]
    assert file.faults(text, "lr=3") == ["command line lr: unknown key; did you mean optimizer.lr?"]
    assert file.faults(text, "evaluation={evry: 3}") == [
        "command line evaluation.evry: unknown key; did you mean evaluation.every?"
    ]
    names = ("metric_for_best_model", "load_best_model_at_end", "early_stopping_patience", "stop_sequences")
    meant = ("best", "best", "patience", "stop")
    assert file.faults(text, *(f"evaluation.{name}=x" for name in names)) == [
        f"command line evaluation.{name}: unknown key; did you mean evaluation.{key}?"
        for name, key in zip(names, meant, strict=True)
    ]
    # What the file says stays the file's fault.
    assert file.faults(text + "  eps: 0\n", "optimizer.lr=2") == [
        "FILE:6 optimizer.eps: should be greater than 0, not 0"
    ]


# ------------------------------------------------------------------------------------------------- faults


def test_all_faults_at_once(file: File) -> None:
    text = """\
model:
  path: 3
  dtpye: float32
task: {kind: seq2sek, source: s}
data:
  train: x.jsonl
  splits: [0.8, 0.1]
optimizer:
  learning_rate: 1e-4
  lr: "1e-4"
  betas: [0.9, 1.0]
evaluation:
  metrics: [rogue, bleu]
name: a/b
name: c
checkpoint: 7
"""
    assert sorted(file.faults(text, "seed=-1")) == sorted(
        [
            "FILE:15 name: this key is given twice",
            "FILE:2 model.path: should be a string, not 3",
            "FILE:3 model.dtpye: unknown key; did you mean model.dtype?",
            f"FILE:4 task.kind: 'seq2sek' is not one of {', '.join(SECTIONS)}; did you mean seq2seq?",
            "FILE:7 data.splits: should be a list of 3, not [0.8, 0.1]",
            "FILE:9 optimizer.learning_rate: unknown key; did you mean optimizer.lr?",
            "FILE:10 optimizer.lr: should be a number, not '1e-4'",
            "FILE:11 optimizer.betas.1: should be less than 1, not 1.0",
            f"FILE:13 evaluation.metrics.0: 'rogue' is not one of {', '.join(get_args(MetricName))}; "
            "did you mean rouge?",
            "FILE:16 checkpoint: expects a section of keys, not 7",
            "command line seed: should be greater than or equal to 0, not -1",
        ]
    )


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("optimizer:", "optimizer: expects a section of keys, not null"),
        ("optimizer: [1]", "optimizer: expects a section of keys, not [1]"),
        ("tuning: lora", "tuning: expects a section of keys, not 'lora'"),
        ("tuning: {rank: 3}", "tuning.method: is missing"),
        ("tuning: {method: LORA}", f"tuning.method: 'LORA' is not one of {METHOD_NAMES}; did you mean lora?"),
        ("tuning: {method: null}", f"tuning.method: null is not one of {METHOD_NAMES}"),
        ("tuning: {methd: lora}", "tuning.methd: unknown key; did you mean tuning.method?"),
        ("batch: {examples: 2.5}", "batch.examples: should be an integer, not 2.5"),
        ("batch: {examples: true}", "batch.examples: should be an integer, not true"),
        ("evaluation: {metrics: rouge}", "evaluation.metrics: should be a list, not 'rouge'"),
        ("name: 12", "name: should be a string, not 12"),
        ("name: a/b", "name: 'a/b' should be letters, digits, '.', '_' and '-', beginning with a letter or a digit"),
        ("tracking: {wandb: 1}", "tracking.wandb: should be a boolean, not 1"),
        ("strategy: {kind: fsdp}", "strategy.kind: 'fsdp' is not one of auto, single, ddp, fsdp2, zero1, zero2, zero3; "
                                   "did you mean fsdp2?"),
        ("duration: {minutes: 0}", "duration.minutes: should be greater than 0, not 0"),
    ],
)  # fmt: skip
def test_fault(file: File, line: str, fault: str) -> None:
    assert file.faults(BASE + line) == [f"FILE:4 {fault}"]


def whole(task: str, method: str) -> dict[str, dict[str, Any]]:
    """Every key of one choice of task and method, with a value of any kind."""
    given: dict[str, Any] = {"task": {"kind": task}, "tuning": {"method": method}}
    sections: dict[str, dict[str, Any]] = {}
    for key in keys_of(Config, given):
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, {})[name] = given.get(section, {}).get(name, "x")
        else:
            sections.setdefault(section, {})
    return sections


def test_every_key_mistyped(file: File) -> None:
    """Each key of every task and method, with each of its letters left out."""
    made, suggested, without = 0, 0, []
    done: set[str] = set()
    for task, method in [*((task, "full") for task in TASKS), *(("seq2seq", method) for method in METHODS)]:
        sections = whole(task, method)
        keys = {section: f"{section}" for section in sections} | {
            f"{section}.{name}": name for section, names in sections.items() for name in names
        }
        for key in keys:
            section, _, name = key.partition(".")
            siblings = sections[section] if name else sections
            variant = {"task": task, "tuning": method}.get(section, "")
            if f"{variant}:{key}" in done:
                continue
            done.add(f"{variant}:{key}")
            letters = name or section
            for wrong in {letters[:at] + letters[at + 1 :] for at in range(len(letters))} - set(siblings) - {""}:
                text = f"task: {{kind: {task}, target: t}}\n" if section != "task" else ""
                if name:
                    others = [f"  {other}: {value}\n" for other, value in siblings.items()
                              if other in ("kind", "method") and other != name]  # fmt: skip
                    text += "".join([f"{section}:\n", *others, f"  {wrong}: x\n"])
                    typed = f"{section}.{wrong}"
                else:
                    text += f"{wrong}: {{}}\n"
                    typed = wrong
                line = text.count("\n")
                faults = file.faults(text)
                mine = [fault for fault in faults if fault.startswith(f"FILE:{line} {typed}: unknown key")]
                assert len(mine) == 1, (typed, faults)
                made += 1
                if mine[0].endswith(f"did you mean {key}?"):
                    suggested += 1
                else:
                    without.append(mine[0])
    print(f"{suggested} of {made} suggestions are right; the others:", *without, sep="\n")
    assert made > 400
    assert suggested / made > 0.98


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_names_of_other_tools(file: File, name: str) -> None:
    ours = ALIASES[name]
    known = {key for task in TASKS for method in METHODS for key in keys_of(
        Config, {"task": {"kind": task}, "tuning": {"method": method}})}  # fmt: skip
    assert ours in known, "we suggest what there is"
    section = ours.partition(".")[0]
    at_the_top = file.faults(BASE + f"{name}: 1\n")
    assert at_the_top == [f"FILE:4 {name}: unknown key; did you mean {ours}?"]
    tail = {"task": "kind: causal", "tuning": "method: lora"}.get(section, "")
    if "." in ours and name not in ours.split("."):
        inside = file.faults(BASE.replace("task", "tsk") + f"{section}:\n  {tail}\n  {name}: 1\n"
                             if section == "task" else f"{section}:\n  {tail}\n  {name}: 1\n")  # fmt: skip
        assert any(f" {section}.{name}: unknown key; did you mean {ours}?" in fault for fault in inside), inside


# -------------------------------------------------------------------------------------- no false refusals

STRINGS = [
    "off", "no", "1e-5", "1e5", "0o17", "0x1F", "017", "12:30", "null", "~", "true", "2024-01-01", "=", "<<", "a: b",
    "#x", " lead", "trail ", "'q'", '"', "two\nlines", "tab\there", "{x}", "[x", "&a", "*a", "!t", "%d", "@x", "`x",
    "ünïcödé 漢字", "🙂", "-", "- a", "?", ".", ".5", "1_000", "+1", "-.inf", "\\", "a\u2028b", "e5",
    "1.", "0b1", "x" * 300, "\ufeffx",
]  # fmt: skip


def random_value(rule: dict[str, Any], rng: random.Random) -> Any:
    for key in ("anyOf", "oneOf"):
        if key in rule:
            return random_value(rng.choice(rule[key]), rng)
    if "const" in rule:
        return rule["const"]
    if "enum" in rule:
        return rng.choice(rule["enum"])
    kind = rule["type"]
    if kind == "array":
        count = rng.randint(rule.get("minItems", 0), rule.get("maxItems", 4))
        return [random_value(rule["items"], rng) for _ in range(count)]
    if kind == "integer":
        highest = rule.get("maximum", rule.get("exclusiveMaximum", 2**40) - 1)
        return rng.choice([rule.get("minimum", 0), rng.randint(1, min(10_000, highest)), highest])
    if kind == "number":
        least = rule.get("minimum", 0)
        return least + rng.choice([0.5, rng.random() * 0.99 + 1e-9, 10 ** rng.uniform(-12, -1)])
    return {"boolean": rng.random() < 0.5, "null": None, "string": rng.choice(STRINGS)}[kind]


def random_config(rng: random.Random) -> Config:
    schema = SCHEMA

    def section(rule: dict[str, Any]) -> dict[str, Any]:
        required = rule.get("required", [])
        return {
            key: one(info) for key, info in rule["properties"].items() if key in required or rng.random() < 0.5
        }  # fmt: skip

    def one(info: dict[str, Any]) -> Any:
        if "oneOf" in info:
            info = rng.choice(info["oneOf"])
        if info.get("items", {}).get("oneOf"):
            return [one(info["items"]) for _ in range(rng.randint(1, 3))]
        return section(schema["$defs"][info["$ref"].rpartition("/")[2]]) if "$ref" in info else random_value(info, rng)

    values = section(schema)
    # What cannot be drawn key by key.
    if "name" in values:
        values["name"] = rng.choice(["1e5", "0o7", "off", "12", "1.5", "0x1F", "a.b-c_d", "1e-5", "null", "2024-01-01"])
    task = values["task"]
    for key in ("source", "text", "messages", "tools", "template", "prompt", "target"):
        if key in task and (key != "target" or task["kind"] == "causal"):
            del task[key]
    if task["kind"] in ("token_classification", "question_answering"):
        task |= {"max_source_tokens": 16}
    elif task["kind"] == "causal" and rng.random() < 0.5:
        task["text"] = rng.choice(STRINGS)
    elif task["kind"] == "causal" and rng.random() < 0.5 and task.get("max_source_tokens", 512) > 1:
        task |= {
            "messages": rng.choice(STRINGS),
            "tools": rng.choice(STRINGS),
            "template": rng.choice([*STRINGS, None]),
        }
    else:
        task["text" if task["kind"] == "classification" else rng.choice(["source", "prompt"])] = rng.choice(STRINGS)
        if task["kind"] == "causal":
            task["target"] = rng.choice(STRINGS)
    if values.get("tuning", {}).get("method") is None:
        values.pop("tuning", None)
    values["data"].pop("splits", None)
    if rng.random() < 0.5:
        values["data"]["splits"] = rng.choice([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.9, 0, 0.1]])
    values["duration"] = rng.choice([{"epochs": 0.1}, {"epochs": 3}, {"steps": 0}, {"steps": 7}, {"minutes": 2}])
    sources = values["data"]["train"]
    if isinstance(sources, list):
        kind = rng.choice(["path", "weight", "tokens"])
        shares = {"path": {}, "weight": {"weight": rng.choice([2, 0.5])}, "tokens": {"tokens": 1 / len(sources)}}
        paths = [rng.choice(STRINGS) for _ in sources]
        values["data"]["train"] = paths if kind == "path" else [{"path": path, **shares[kind]} for path in paths]
    trains_tokenizer = str(values["model"].get("tokenizer")).startswith("train:")
    if "classification" in task["kind"] or "steps" not in values["duration"] or trains_tokenizer:
        values["data"].pop("streaming", None)
    values["batch"] = rng.choice([{}, {"examples": 7}, {"tokens": 500}, {"examples": None, "tokens": 9}])
    values["batch"] |= rng.choice([{}, {"micro_examples": 3}, {"micro_tokens": 64}])
    if values["data"].get("batching") == "packed":
        values.get("model", {}).pop("attention", None)
        if not SECTIONS[task["kind"]].packs:
            del values["data"]["batching"]
    if "checkpoint" in values:
        values["checkpoint"]["every"] = rng.choice([1, 700, "30s", "10m", "2h"])
    if "evaluation" in values:
        values["evaluation"]["metrics"] = rng.choice([None, [], ["perplexity"]])
        values["evaluation"]["best"] = rng.choice([None, "loss"])
    config = Config.model_validate(values)
    return random_config(rng) if list(conflicts(config)) else config


def test_what_is_written_is_read_back(file: File) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(120):
        config = random_config(rng)
        assert file.read(dump_config(config)) == config
        # As a reader of YAML 1.1 sees it, too, but for numbers like 017.
        assert yaml.safe_load(dump_config(config)) == config.model_dump(mode="json")


# ---------------------------------------------------------------------------------------------- conflicts

CAUSAL = "model: {path: a/b}\ndata: {train: x.jsonl}\ntask:\n  kind: causal\n"
CLASSES = "model: {path: a/b}\ndata: {train: x.jsonl}\ntask:\n  kind: classification\n  label: l\n"
EXACTLY = "the input comes from exactly one of"
NOT_FOR_THIS = "not for this task, whose metrics are"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("model: {path: a/b}\ndata: {train: x}\ntask: {kind: seq2seq, target: t}",
         f"FILE:3 task: {EXACTLY} task.source or task.prompt; none is given"),
        (BASE.replace("source: s", "source: s, prompt: p"),
         f"FILE:2 task.prompt: {EXACTLY} task.source or task.prompt; give one, not task.source and task.prompt"),
        (CAUSAL + "  target: t",
         f"FILE:3 task: {EXACTLY} task.source or task.text or task.messages or task.prompt; none is given"),
        (CAUSAL + "  source: s\n  text: x\n  prompt: p\n",
         f"FILE:7 task.prompt: {EXACTLY} task.source or task.text or task.messages or task.prompt; "
         "give one, not task.source and task.text and task.prompt"),
        (CAUSAL + "  messages: m\n  text: t\n",
         f"FILE:5 task.messages: {EXACTLY} task.source or task.text or task.messages or task.prompt; "
         "give one, not task.text and task.messages"),
        (CAUSAL + "  messages: m\n  target: t\n",
         "FILE:6 task.target: task.messages already holds the assistant's turns; leave task.target out"),
        (CAUSAL + "  source: s\n  target: t\n  template: chatml\n", "FILE:7 task.template: only with task.messages"),
        (CAUSAL + "  text: s\n  tools: t\n", "FILE:6 task.tools: only with task.messages"),
        (CAUSAL + "  messages: m\n  max_source_tokens: 1\n",
         "FILE:6 task.max_source_tokens: a conversation needs at least 2 tokens, one to read and one to learn"),
        (CAUSAL + "  source: s\n",
         "FILE:3 task: task.target is missing (or give task.text: the loss is then on all of it)"),
        (CAUSAL + "  text: s\n  target: t\n",
         "FILE:6 task.target: task.text already holds the whole text; leave task.target out"),
        (CLASSES, f"FILE:3 task: {EXACTLY} task.text or task.prompt; none is given"),
        (BASE.replace("x.jsonl", "x.jsonl, splits: [0.5, 0.1, 0.1]"),
         "FILE:3 data.splits: the shares add up to 0.7, not to 1"),
        (BASE.replace("x.jsonl", "x.jsonl, splits: [0, 0.5, 0.5]"),
         "FILE:3 data.splits: the share of the training examples, the first, cannot be 0"),
        (BASE + "duration: {epochs: 1, steps: 3}",
         "FILE:4 duration: give exactly one of duration.epochs, duration.steps and duration.minutes"),
        (BASE + "duration: {}",
         "FILE:4 duration: give exactly one of duration.epochs, duration.steps and duration.minutes"),
        (BASE.replace("a/b", "a/b, weights: random, tokenizer: 'train:x'"),
         "FILE:1 model.tokenizer: train:N needs a whole number N of pieces, at least 300 (256 are the bytes)"),
        (BASE.replace("a/b", "a/b, weights: random, tokenizer: 'train:299'"),
         "FILE:1 model.tokenizer: train:N needs a whole number N of pieces, at least 300 (256 are the bytes)"),
        (BASE.replace("a/b", "a/b, weights: random, tokenizer: 'train:²³⁴⁵'"),
         "FILE:1 model.tokenizer: train:N needs a whole number N of pieces, at least 300 (256 are the bytes)"),
        (BASE.replace("a/b", "a/b, tokenizer: 'train:300'"),
         "FILE:1 model.tokenizer: a newly trained tokenizer does not fit pretrained weights; "
         "use model.weights: random"),
        (BASE.replace("a/b", "a/b, layers: []"),
         "FILE:1 model.layers: keep at least one layer, or leave the key out to keep all"),
        (BASE.replace("a/b", "a/b, layers: [0]") + "tuning: {method: lora}\n",
         "FILE:1 model.layers: an adapter is loaded beside the whole model; use tuning.method: full or freeze"),
        (BASE + "evaluation: {metrics: [rouge, accuracy]}",
         f"FILE:4 evaluation.metrics: accuracy: {NOT_FOR_THIS} {', '.join(WRITTEN)}"),
        (CLASSES + "  text: x\nevaluation: {metrics: [rouge, accuracy, perplexity]}",
         f"FILE:7 evaluation.metrics: rouge: {NOT_FOR_THIS} accuracy, macro_f1, micro_f1, matthews, perplexity"),
        (CAUSAL + "  text: x\nevaluation: {metrics: [rouge, chrf, perplexity]}",
         f"FILE:6 evaluation.metrics: rouge, chrf: {NOT_FOR_THIS} perplexity"),
    ],
)  # fmt: skip
def test_conflict(file: File, text: str, fault: str) -> None:
    assert file.faults(text) == [fault]


def test_conflicts_are_told_together_and_on_their_place(file: File) -> None:
    faults = file.faults(BASE + "evaluation: {metrics: [accuracy]}", "duration.steps=null", "task.source=null")
    assert [fault.partition(": ")[0] for fault in faults] == [
        "FILE:2 task", "command line duration", "FILE:4 evaluation.metrics",
    ]  # fmt: skip


def test_shares_are_only_checked_where_they_are_used(file: File) -> None:
    assert file.read(BASE.replace("x.jsonl", "x.jsonl, splits: [0.5, 0.1, 0.1], test: y.jsonl")).data.test == "y.jsonl"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("every: 10x", "every: '10x' should be a whole number of steps, or of seconds, minutes or hours: 30s, 10m, 2h"),
        ("every: 0m", "every: '0m' should be a whole number of steps, or of seconds, minutes or hours: 30s, 10m, 2h"),
        ("every: 0", "every: should be greater than or equal to 1, not 0"),
        ("every: 1.5", "every: should be an integer, not 1.5"),
        ("resume: true", "resume: should be a string, not true"),
        ("resume: ''", "resume: string should have at least 1 character, not ''"),
        ("save_steps: 5", "save_steps: unknown key; did you mean checkpoint.every?"),
        ("resume_from_checkpoint: x", "resume_from_checkpoint: unknown key; did you mean checkpoint.resume?"),
    ],
)
def test_when_checkpoints_are_made_and_gone_on_from(tmp_path: Path, given: str, problem: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {path: m}\ntask: {kind: causal, text: text}\ndata: {train: d.jsonl}\n"
        f"checkpoint:\n  keep: 2\n  {given}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    assert str(caught.value) == f"{path}:6 checkpoint.{problem}"
