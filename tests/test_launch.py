"""Every command of docs/RECIPES.md and docs/launch parses, and the launch files do what they say."""

import dataclasses
import os
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from benchmarks import scaling
from lmim_fast.cli import COMMANDS
from lmim_fast.cli_options import parse
from lmim_fast.config import CharsetConfig, EvaluateConfig, FinetuneConfig, PretrainConfig

DOCS = Path(__file__).parents[1] / "docs"
RECIPES, SLURM, KUBERNETES = DOCS / "RECIPES.md", DOCS / "launch/slurm.sh", DOCS / "launch/pytorchjob.yaml"
SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
ENTRY = re.compile(r"lmim_fast\.(\w+)")


def joined(text: str) -> list[str]:
    """Lines of a shell text, continued ones joined."""
    return text.replace("\\\n", " ").splitlines()


def recipe_lines() -> list[str]:
    """Lines of code blocks, and inline code that names options."""
    blocks = re.findall(r"^```\n(.*?)^```", text := RECIPES.read_text(encoding="utf-8"), re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [line for block in blocks for line in joined(block)]
    return lines + [code for code in inline if " -" in code.split("-m lmim_fast")[-1]]


def kubernetes_pod() -> dict:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(KUBERNETES.read_text(encoding="utf-8"))
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


def kubernetes_command() -> list[str]:
    """Of the container, read as text: a list of plain words."""
    block = re.search(r"command:\n((?: +- .*\n)+)", KUBERNETES.read_text(encoding="utf-8"))
    return re.findall(r"- (.*)", block[1])


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True) if word != "&"]


def commands() -> list[list[str]]:
    """Word lists that begin with lmim, python or torchrun."""
    found = [words_of(line) for line in recipe_lines() if re.match(r"(lmim|python|torchrun) ", line)]
    script = joined(SLURM.read_text(encoding="utf-8"))
    found += [words_of(line)[1:] for line in script if line.startswith("srun torchrun ")]
    return [*found, kubernetes_command()]


OURS = [words for words in commands() if words[0] == "lmim" or any(map(ENTRY.fullmatch, words))]


def test_commands_are_found_in_every_file() -> None:
    assert len(OURS) >= 18
    assert sum(words[0] == "torchrun" for words in OURS) >= 4
    assert any("--rdzv-id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" in words for words in OURS)


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_parses(words: list[str]) -> None:
    if words[0] == "lmim":
        length = 2 if " ".join(words[1:3]) in COMMANDS else 1
        name, options = " ".join(words[1 : 1 + length]), words[1 + length :]
    else:
        module = next(number for number, word in enumerate(words) if ENTRY.fullmatch(word))
        assert words[module - 1] == "-m"
        name, options = ENTRY.fullmatch(words[module])[1], words[module + 1 :]
        if words[0] == "torchrun":
            torchrun.parse_args([*words[1 : module - 1], "-m", words[module]])
    if "--help" in options:
        options.remove("--help")
        options += ["--data", "x"]
    config = parse(COMMANDS[name].config, options, name, "about")
    assert isinstance(config, COMMANDS[name].config)


def names(kind: type, prefix: str = "") -> set[str]:
    """Options of a config dataclass."""
    hints, found = typing.get_type_hints(kind), set()
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name.replace('_', '-')}"
        found.add(f"--{name}")
        if dataclasses.is_dataclass(hints[field.name]):
            found |= names(hints[field.name], f"{name}.")
    return found


def test_every_option_that_the_recipes_name_exists() -> None:
    kinds = PretrainConfig, FinetuneConfig, EvaluateConfig, CharsetConfig, scaling.Options
    known = set().union(*map(names, kinds))
    known |= set(torchrun.get_args_parser()._option_string_actions)
    known |= {"--jobs", "--size"}  # of benchmarks.value
    text = RECIPES.read_text(encoding="utf-8")
    named = {option.rstrip(".") for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)}
    assert named - known == set()


def test_the_switch_is_set_before_every_torchrun_that_restarts() -> None:
    for block in re.findall(r"^```\n(.*?)^```", RECIPES.read_text(encoding="utf-8"), re.M | re.S):
        if "--max-restarts" in block:
            assert block.index(f"export {SWITCH}=1") < block.index("torchrun")
    script = SLURM.read_text(encoding="utf-8")
    assert script.index(f"export {SWITCH}=1") < script.index("srun torchrun")
    assert re.search(rf'name: {SWITCH}\n +value: "1"', KUBERNETES.read_text(encoding="utf-8"))


def test_the_pytorchjob_is_elastic_and_its_mounts_exist() -> None:
    yaml = pytest.importorskip("yaml")
    job, pod = yaml.safe_load(KUBERNETES.read_text(encoding="utf-8")), kubernetes_pod()
    spec, (container,) = job["spec"], pod["containers"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]  # an elastic job has no master
    worker, policy = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    assert worker["restartPolicy"] == "OnFailure"
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert str(gpus) == spec["nprocPerNode"]
    for replicas in range(policy["minReplicas"], policy["maxReplicas"] + 1):
        assert parse_batch(kubernetes_command()) % (replicas * gpus) == 0
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert container["command"] == kubernetes_command()


def parse_batch(words: list[str]) -> int:
    return parse(PretrainConfig, words[words.index("lmim_fast.pretrain") + 1 :], "lmim", "about").batch_size


def test_the_slurm_script_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text(encoding="utf-8")
    assert int(re.search(r"B:USR1@(\d+)", text)[1]) > int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", text)[1])


@pytest.fixture
def slurm(tmp_path: Path):
    """Starts the script with stand-ins: srun runs the step here, scontrol writes down what it was told."""
    (tmp_path / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" >> told; echo node0; echo node1\n')

    def start(torchrun_body: str) -> subprocess.Popen:
        (tmp_path / "torchrun").write_text(f"#!/bin/bash\n{torchrun_body}\n")
        for name in ("srun", "scontrol", "torchrun"):
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
        }
        return subprocess.Popen(["bash", SLURM], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)

    return start


@pytest.mark.parametrize("status", [0, 3])
def test_the_slurm_job_ends_as_the_run_ends(slurm, tmp_path: Path, status: int) -> None:
    process = slurm(f'echo "$@" > arguments; echo "${SWITCH}" >> arguments; exit {status}')
    process.communicate(timeout=60)
    assert process.returncode == status
    arguments, switch = (tmp_path / "arguments").read_text().splitlines()
    assert "--rdzv-endpoint=node0:29500 --rdzv-id=7-0" in arguments
    assert switch == "1"
    assert "requeue" not in (tmp_path / "told").read_text()


def test_before_its_time_limit_the_slurm_job_lets_the_run_save_and_requeues(slurm, tmp_path: Path) -> None:
    # As torchrun: it ends with 1 after a signal, once its processes have saved.
    process = slurm(
        'trap "sleep 0.5; echo saved > saved; exit 1" TERM; echo ready; while :; do sleep 0.05; done'
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(subprocess.signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "told").read_text().splitlines()[-1] == "requeue 7"


def test_the_predicted_figures_are_those_that_the_command_prints() -> None:
    text, options = RECIPES.read_text(encoding="utf-8"), scaling.Options()
    shown = {
        name: re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.S)[1]
        for name in ("times", "sentences")
    }
    assert shown["times"] == scaling.times_table(options)
    assumed = scaling.setup(options)
    told = [
        scaling.sentence(name, scaling.rows(scaling.lmim(name, config), options, assumed), assumed)
        for name, config in scaling.MODELS.items()
    ]
    assert shown["sentences"] == "\n".join(f"- {line}" for line in told)
