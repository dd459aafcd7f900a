from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from klear_megatron.config import Section, load_config, write_config
from klear_megatron.errors import UserError


class Optimizer(Section):
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Reward(Section):
    weight: float = 1.0


class Config(Section):
    run_dir: Path
    optimizer: Optimizer
    style: Literal["cosine", "linear"] = "cosine"
    steps: int = 1
    stages: dict[str, Optimizer] = Field(default_factory=dict)
    rewards: tuple[Reward, ...] = ()
    extra: Reward | None = None
    shares: dict[str, float] = Field(default_factory=dict)
    saved: bool = False


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path / "config.yaml"


GOOD = "run_dir: runs/a\noptimizer: {lr: 1.0e-3}\n"


def test_overrides_come_after_the_file_and_create_sections(tmp_path):
    path = write(tmp_path, "run_dir: runs/a\nsteps: 3\n")
    overrides = ["--optimizer.lr", "1e-4", "--steps=5", "--optimizer.betas", "[0.8, 0.9]"]
    config = load_config(Config, path, overrides)
    expected = Optimizer(lr=1e-4, betas=(0.8, 0.9))
    assert config == Config(run_dir=Path("runs/a"), optimizer=expected, steps=5)


def test_overrides_of_other_trainers_habits_are_taken(tmp_path):
    path = write(tmp_path, GOOD)
    assert load_config(Config, path, ["optimizer.lr=0.5", "steps=2"]) == load_config(
        Config, path, ["--optimizer.lr", "0.5", "--steps", "2"]
    )
    assert load_config(Config, path, ["--saved", "yes"]).saved


def test_a_value_of_the_command_line_is_not_given_the_line_of_the_file(tmp_path):
    path = write(tmp_path, GOOD + "steps: x\n")
    with pytest.raises(UserError, match=r"line 3: steps: Input should be a valid integer"):
        load_config(Config, path)
    with pytest.raises(UserError, match=r"values:\n  steps: Input should be a valid integer"):
        load_config(Config, path, ["--steps", "y"])


def test_what_is_written_loads_back_equal_with_every_default(tmp_path):
    config = load_config(Config, write(tmp_path, GOOD))
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(Config, tmp_path / "resolved.yaml") == config
    assert "style: cosine" in (tmp_path / "resolved.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (GOOD + "step: 3\n", [], "step: unknown key; did you mean steps?"),
        (GOOD, ["--lr", "1"], "lr: unknown key; did you mean optimizer.lr?"),
        (GOOD, ["--optimizer.style", "x"], "optimizer.style: unknown key; did you mean style?"),
        (GOOD, ["--optimizer.learning", "1"], "optimizer.learning: unknown key; there are: lr,"),
        (GOOD, ["--stages.first.lrr", "1"], "stages.first.lrr: unknown key; did you mean lr?"),
        (
            GOOD + "rewards: [{wight: 1}]\n",
            [],
            "rewards.0.wight: unknown key; did you mean weight?",
        ),
        (GOOD, ["--extra.wight", "1"], "extra.wight: unknown key; did you mean weight?"),
        ("optimizer: {lr: 1}\n", [], "run_dir: missing"),
        (GOOD, ["--optimizer.lr", "0"], "optimizer.lr: Input should be greater than 0; given: 0"),
        (GOOD, ["--style", "cosin"], "style: Input should be 'cosine' or 'linear'"),
        (GOOD, ["steps", "3"], "'steps': overrides look like --section.key value"),
        (GOOD, ["--steps"], "--steps: a value must follow"),
        (GOOD, ["--steps", "--run_dir", "x"], "--steps: a value must follow"),
        (GOOD, ["--run_dir", "{a} {b}"], "quotes within those of the shell: '\"{a} {b}\"'"),
        (GOOD, ["--run_dir", "#### (.+)"], "YAML takes its # for a comment; a text with signs"),
        (GOOD, ["run_dir=a # b"], "'a # b': YAML takes its # for a comment"),
        (GOOD, ["--optimizer", "a"], "optimizer: Input should be a section with its keys; given"),
        (GOOD, ["--stepz", "1", "--xy", "1"], "steps?\n  xy: unknown key; there are: "),
        (GOOD, ["--xy", "1", "--zz", "1"], "\n  zz: unknown key"),
        (GOOD + "steps: 2\nrun_dir: b\n", [], "run_dir is there twice, in lines 1 and 4"),
        (
            GOOD + "stages:\n  one:\n    lr: 1\n    lr: 2\n",
            [],
            "stages.one.lr is there twice, in lines 5 and 6",
        ),
        (GOOD + "steps: yes\n", [], "line 3: steps: YAML reads yes, no, on"),
        (GOOD + "style: no\n", [], "line 3: style: YAML reads yes, no, on"),
        (GOOD + "shares: {math: on}\n", [], "line 3: shares: YAML reads yes, no, on"),
        (GOOD + "rewards:\n- weight: off\n", [], "line 4: rewards.0.weight: YAML reads yes"),
        (GOOD, ["--steps", "yes"], "  steps: YAML reads yes"),
        (GOOD, ["--steps.more", "3"], "steps"),
        ("a: [", [], "not valid YAML"),
        ("- a\n", [], "the top level must be a mapping"),
        ("[]", [], "the top level must be a mapping"),
        ("", [], "run_dir: missing"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(UserError) as error:
        load_config(Config, write(tmp_path, text), overrides)
    assert message in str(error.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_config(Config, write(tmp_path, "optimiser: {lr: 1}\nsteps: x\n"))
    for message in ("optimiser: unknown key; did you mean optimizer?", "run_dir: missing", "steps"):
        assert message in str(error.value)


def test_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("run_dir: Läufe\noptimizer: {lr: 1}\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yaml: not UTF-8: .*save it in that encoding"):
        load_config(Config, path)
    path.write_bytes("run_dir: Läufe\noptimizer: {lr: 1}\n".encode())
    assert load_config(Config, path).run_dir == Path("Läufe")
