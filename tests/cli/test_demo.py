"""``demo``: what it refuses before training, what it makes of a failed check."""

import os
import sys

import pytest

from mistral_ms.cli import demo as command
from mistral_ms.cli import demo_page, demo_story, main
from mistral_ms.cli.backend_log import backend_log
from mistral_ms.config import OptimizerConfig
from mistral_ms.data import demo_text
from mistral_ms.errors import ConfigError
from mistral_ms.tokenizer import packaged_tokenizer
from mistral_ms.training import TrainingSummary
from mistral_ms.training.report import Check


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_mixtral.py", "demo", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as info:
            main()
        captured = capfd.readouterr()
        return info.value.code or 0, captured.out, captured.err

    return call


class TestRefusals:
    def test_output_is_a_file(self, run, tmp_path):
        (tmp_path / "file").touch()
        code, _, err = run("--output", tmp_path / "file")
        assert code == 2
        assert "cannot write: --output" in err

    def test_no_place_for_the_json_file(self, run, tmp_path):
        code, _, err = run("--output", tmp_path / "out", "--json", tmp_path / "none" / "x.json")
        assert code == 2
        assert "cannot write: --json" in err
        assert "No such file or directory" in err

    def test_no_configs(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(command, "RUN_FILE", tmp_path / "configs" / "demo.yaml")
        code, _, err = run("--output", tmp_path / "out")
        assert code == 2
        assert "demo.yaml: No such file" in err
        assert not (tmp_path / "out").exists()

    def test_too_few_steps(self, run, tmp_path):
        code, _, err = run("--output", tmp_path / "out", "--steps", 1)
        assert code == 2
        assert "--steps" in err


class TestRun:
    def test_fewer_steps_shorten_the_warmup(self):
        full, short = command.load_demo_run(), command.load_demo_run(20)
        assert short.training.max_steps == 20
        assert short.training.warmup_steps == 5 < full.training.warmup_steps
        assert short.model == full.model
        assert short.training.optimizer == full.training.optimizer != OptimizerConfig()

    def test_many_steps_keep_it(self):
        full = command.load_demo_run()
        longer = command.load_demo_run(4 * full.training.max_steps)
        assert longer.training.warmup_steps == full.training.warmup_steps

    def test_the_title_begins_the_text(self):
        text = demo_story.read_text(packaged_tokenizer())
        assert demo_text().startswith(text.title + "\n")
        assert text.ids[: len(text.title_ids)] == text.title_ids
        assert len(text.title_ids) < 32


class TestFailedCheck:
    @pytest.fixture
    def told(self, monkeypatch, tmp_path):
        """A story without the work; its checks come from the test."""

        def install(*checks):
            class Story:
                files = demo_story.Files(tmp_path)
                seconds = 1.0

            Story.checks = checks
            monkeypatch.setattr(demo_story, "tell", lambda *args, **options: Story)
            monkeypatch.setattr(demo_story, "result", lambda story: {"passed": False})
            monkeypatch.setattr(demo_page, "write_page", lambda story: None)

        return install

    def test_exits_with_1_and_says_which(self, told, run, tmp_path):
        told(Check("bits are equal", False, "3 differ"), Check("the loss falls", True, ""))
        code, out, _ = run("--output", tmp_path, "--json", tmp_path / "result.json")
        assert code == 1
        assert "failed  bits are equal\n" in out
        assert (tmp_path / "result.json").exists()

    def test_exits_with_0_when_all_hold(self, told, run, tmp_path):
        told(Check("the loss falls", True, ""))
        code, out, _ = run("--output", tmp_path)
        assert code == 0
        assert "failed" not in out


class TestChecks:
    def summary(self, first, final):
        return TrainingSummary(first, final, 1.0, 10, 0, 1.0, 1.0, True, 1)

    @pytest.mark.parametrize(
        ("first", "final", "learns", "held"),
        [
            (10.4, 0.02, True, [True, True]),
            (10.4, 0.6, True, [True, False]),
            (10.4, 6.0, False, [True, True]),
            (10.4, 10.5, False, [True, False]),
            (10.6, 6.0, False, [False, True]),
            (9.9, 6.0, False, [False, True]),
        ],
    )
    def test_losses(self, first, final, learns, held):
        checks = demo_story.loss_checks(self.summary(first, final), 32000, learns)
        assert [check.passed for check in checks] == held

    @pytest.mark.parametrize(("recited", "held"), [(0, False), (26, False), (27, True), (54, True)])
    def test_recitation(self, recited, held):
        assert demo_story.recitation(recited, 54).passed is held

    @pytest.mark.parametrize(
        ("ids", "want"), [((), 0), ((1, 2, 3), 3), ((1, 9, 3), 1), ((9,), 0), ((1, 2, 3, 4), 3)]
    )
    def test_matching(self, ids, want):
        assert demo_story.matching(ids, (1, 2, 3)) == want


class TestBackendLog:
    def test_catches_what_goes_to_the_descriptor(self, tmp_path, capfd):
        with backend_log(tmp_path / "log"):
            os.write(2, b"native\n")
        os.write(2, b"after\n")
        assert (tmp_path / "log").read_text() == "native\n"
        assert capfd.readouterr().err == "after\n"

    def test_an_empty_log_is_removed(self, tmp_path):
        with backend_log(tmp_path / "log"):
            pass
        assert not (tmp_path / "log").exists()

    def test_errors_leave_with_stderr_restored(self, tmp_path, capfd):
        with pytest.raises(ConfigError), backend_log(tmp_path / "log"):
            raise ConfigError("bad")
        os.write(2, b"seen\n")
        assert capfd.readouterr().err == "seen\n"
