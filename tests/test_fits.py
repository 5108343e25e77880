"""Many fits of one yaml, and what each leaves for the command that runs them."""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_tips.core import Fit, FitRecord, run_fits
from lightning_tips.core.fit_server import FitServer
from lightning_tips.core.fits import MODULE, PRELOAD, loggers_of_fit

from harness import STEPS_A_EPOCH, PlainModule, fit


def test_loggers_of_fits_write_in_folders_of_their_own() -> None:
    wandb = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "p", "id": "x", "dir": None},
    }
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "s"}}
    first, second = loggers_of_fit([wandb, csv], Path("/runs/m/member_2"), "member_2")
    assert first["init_args"] == {
        "project": "p", "id": "x-member_2", "save_dir": "/runs/m/member_2", "group": "m", "name": "m-member_2",
    }  # fmt: skip
    assert second["init_args"] == {"save_dir": "/runs/m/member_2"}
    assert loggers_of_fit(False, Path("/runs"), "a") is False
    assert loggers_of_fit(None, Path("/runs"), "a")["class_path"].endswith("CSVLogger")


def fake(index: int, folder: Path, script: str) -> Fit:
    name = f"member_{index}"
    path = folder / name
    return Fit(name, path, (sys.executable, "-c", script, str(path / "last.ckpt")), f"print {index}")


def test_a_failed_fit_stops_no_other_and_goes_on_the_next_time(tmp_path: Path) -> None:
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write(str(len(sys.argv)))"
    fits = [fake(0, tmp_path, write), fake(1, tmp_path, write + "; sys.exit('no memory')"), fake(2, tmp_path, write)]
    told: list[str] = []
    assert run_fits(fits, 2, [None], told.append) == {"member_1": "no memory"}
    assert [fit.is_done for fit in fits] == [True, False, True]
    again = [fits[0], fake(1, tmp_path, write), fits[2]]
    assert run_fits(again, 2, [None], told.append) == {}
    assert fits[1].checkpoint.read_text() == "23"  # told to resume from its checkpoint
    assert fits[0].checkpoint.read_text() == "2"  # left alone
    assert "member_1 goes on" in "".join(told)
    other = Fit(fits[0].name, fits[0].folder, fits[0].command, "another")
    with pytest.raises(ValueError, match="another configuration"):
        run_fits([other], 1, [None])


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with path.with_name("record.json.lock").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("77")
        other.flush()
        with pytest.raises(MisconfigurationException, match=r"Another process \(77\) trains in"):
            fit(FitRecord(str(path)), folder=tmp_path, max_epochs=1)
    record = FitRecord(str(path))
    for _ in range(2):
        fit(record, folder=tmp_path, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="no such metric"):
        fit(record, Complains(), folder=tmp_path, max_epochs=1)
    fit(FitRecord(str(path)), folder=tmp_path, max_epochs=1)


class Complains(Callback):
    def on_train_start(self, *_: Any) -> None:
        raise MisconfigurationException("no such metric")


def is_ended(_: list[str]) -> int:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    finally:
        Path("cleaned").touch()
    return 0


def test_a_command_that_is_ended_ends_what_it_has_started(tmp_path: Path, monkeypatch) -> None:
    from lightning_tips.cli import COMMANDS, main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "wait", ("test_fits:is_ended", ""))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["wait"])
    assert ended.value.code == 143
    assert Path("cleaned").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_options_from_the_environment_belong_to_a_fit(tmp_path: Path, monkeypatch) -> None:
    plain = Fit.make("a", tmp_path, [], 0, False).fingerprint
    monkeypatch.setenv("LIGHTNING_TIPS_FIT__TRAINER__MAX_EPOCHS", "3")
    assert Fit.make("a", tmp_path, [], 0, False).fingerprint != plain


def test_what_is_not_wanted_is_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('done')"
    fits = [fake(0, tmp_path, "import sys; sys.exit('no')"), *(fake(index, tmp_path, write) for index in (1, 2, 3))]
    asked: list[tuple[str, dict[str, str]]] = []

    def unwanted(fit: Fit, failed: dict[str, str]) -> str | None:
        asked.append((fit.name, dict(failed)))
        return "too slow" if fit.name == "member_2" else None

    told: list[str] = []
    assert run_fits(fits, 1, [None], told.append, unwanted) == {"member_0": "no"}
    assert [fit.is_done for fit in fits] == [False, True, False, True]
    assert asked[1] == ("member_1", {"member_0": "no"})
    assert "member_2 is left out: too slow" in told


def test_last_words_are_the_message_of_the_exception(tmp_path: Path) -> None:
    one = fake(0, tmp_path, "")
    assert one.last_words() == "it printed nothing"
    one.folder.mkdir()
    log = one.folder / "log.txt"
    log.write_text("starts\nand ends\n")
    assert one.last_words() == "and ends"
    frames = "Traceback (most recent call last):\n  File 'x', line 1\n    f()\n"
    log.write_text(
        f"{frames}KeyError: 1\n\nDuring it:\n\n{frames}ValueError: first,\n then second\n\n\033[34mwandb: bye\n"
    )
    assert one.last_words() == "ValueError: first,\n then second"


@pytest.mark.skipif(not FitServer.works_here(), reason="no safe fork")
def test_a_fork_is_like_a_python_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared.py").write_text("import tempfile\nfolder = tempfile.TemporaryDirectory()\nprint('noise')\n")
    (tmp_path / "job.py").write_text(
        "import atexit, os, sys, time\n"
        "import __main__, shared\n"
        "there = os.path.isdir(shared.folder.name)\n"
        "print(__name__, __main__.__spec__.name, sys.argv[1:], os.environ.get('ONLY'), there)\n"
        "atexit.register(print, 'bye')\n"
        "if sys.argv[1] == 'sleep':\n    time.sleep(60)\n"
        "if sys.argv[1] == 'fail':\n    raise ValueError('as told')\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    package = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{package}")
    server, log = FitServer("job", preload="shared"), tmp_path / "log.txt"
    environment = dict(os.environ)
    assert server.run(["0"], environment | {"ONLY": "first"}, log).wait() == 0
    assert server.run(["3"], environment, log).wait() == 3
    assert server.run(["fail"], environment, log).wait() == 1
    printed = log.read_text()
    assert "__main__ job ['0'] first True\nbye\n" in printed  # at exit, what it registered itself
    assert "__main__ job ['3'] None True\nbye\n" in printed  # the first has left the shared folder alone
    assert "ValueError: as told" in printed
    stopped = server.run(["sleep"], environment, log)
    assert stopped.poll() is None
    stopped.terminate()
    assert stopped.wait() == -15
    left = server.run(["sleep"], environment, log)
    server.close()  # ends what still runs
    assert left.poll() in (-1, -15)


@pytest.mark.skipif(not FitServer.works_here(), reason="no safe fork")
def test_a_fork_starts_the_other_ranks_of_its_fit(tmp_path: Path) -> None:
    config = {
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 1, "logger": False},
        "model": {"class_path": "ImageClassifier", "init_args": {"in_channels": 1}},
        "data": {"class_path": "DigitsDataModule", "init_args": {"train_size": 64}},
    }
    config["trainer"]["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path)}}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    server, log = FitServer(MODULE, PRELOAD), tmp_path / "log.txt"
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    assert server.run(["fit", "--config", str(tmp_path / "run.yaml")], environment, log).wait() == 0, log.read_text()
    server.close()
    assert "MEMBER: 2/2" in log.read_text()
    assert torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["global_step"] == 1  # 32 images a rank


def test_fits_take_turns_on_the_devices(tmp_path: Path) -> None:
    write = "import os, sys, pathlib; pathlib.Path(sys.argv[1]).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    fits = [fake(index, tmp_path, write) for index in range(4)]
    assert run_fits(fits, 2, ["3", "5"], lambda _: None) == {}
    assert {fit.checkpoint.read_text() for fit in fits} == {"3", "5"}


def test_a_fit_leaves_what_it_came_to_and_cost(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    fit(FitRecord(str(path)), folder=tmp_path, max_epochs=3)
    record = json.loads(path.read_text())
    assert [row["epoch"] for row in record["rows"]] == [0, 1, 2]
    assert record["metrics"] == record["rows"][-1]
    assert 0 <= record["metrics"]["val_acc"] <= 1
    assert record["steps"] == 3 * STEPS_A_EPOCH
    assert not record["stopped_early"]
    assert record["parameters"] == sum(p.numel() for p in PlainModule().parameters())
    assert 0 < record["step_seconds"] < record["seconds"]
    assert record["cpu_seconds"] > 0
    assert record["peak_megabytes"] > 1

    class Never(EarlyStopping):
        pass

    fit(FitRecord(str(path)), Never("val_loss", patience=1, min_delta=1e6), folder=tmp_path, max_epochs=5)
    again = json.loads(path.read_text())
    assert again["stopped_early"]
    assert len(again["rows"]) == 2


def test_a_resumed_fit_leaves_the_record_of_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    trainer = fit(FitRecord(str(path)), folder=tmp_path, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    half = json.loads(path.read_text())
    fit(FitRecord(str(path)), folder=tmp_path, max_epochs=4, ckpt_path=str(tmp_path / "half.ckpt"))
    whole = json.loads(path.read_text())
    assert [row["epoch"] for row in whole["rows"]] == [0, 1, 2, 3]
    assert whole["rows"][:2] == half["rows"]
    assert whole["seconds"] > half["seconds"]


def test_numbers_without_a_word_in_json_are_null(tmp_path: Path) -> None:
    class Diverges(PlainModule):
        def validation_step(self, batch: object, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(float("nan")))

    fit(FitRecord(str(tmp_path / "record.json")), folder=tmp_path, module=Diverges(), max_epochs=1)
    assert json.loads((tmp_path / "record.json").read_text())["metrics"]["val_loss"] is None
