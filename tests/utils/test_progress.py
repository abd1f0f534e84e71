"""The progress bar: shown only on terminals."""

import re

from rich.console import Console, ConsoleDimensions

from diffdiscover3d.utils.progress import ProgressBar


def work(**options):
    with ProgressBar(total=6, **options) as stages:
        for number in range(2):
            stages.begin_case(f"scan {number + 1} of 2", 3)
            stages.show("reading the scan", "loss 0.5")
            stages.done()
        return stages


def test_silent_when_piped(capsys):
    work()
    work(enabled=False, force=True)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_drawn_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "size", ConsoleDimensions(140, 25))
    work(force=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "scan 2 of 2: reading the scan" in printed.err and "left" in printed.err and "loss 0.5" in printed.err


def test_what_a_case_did_not_need_leaves_the_total():
    stages = work(enabled=False)
    (task,) = stages._bar.tasks
    assert (task.completed, task.total) == (2, 4)  # two of the three steps of the first case were skipped


def test_a_share_of_a_long_step(capfd):
    with ProgressBar(total=4, force=True) as stages:
        stages.begin_case("scan 1 of 1", 4)
        stages.done()
        stages.within(3, 4, "window")
        task = stages._bar.tasks[0]
        assert task.completed == 1.75 and task.fields["details"] == "window 3 of 4"
        stages.done()
        assert task.completed == 2


def test_numbers_stay_readable_on_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Console, "size", ConsoleDimensions(80, 25))
    with ProgressBar(total=120, force=True) as bar:
        bar.begin_case("scan 113 of 116", 5)
        bar.show("finding the parts of level 2, which takes long", "loss 0.5")
        bar.done(42)
        bar._bar.refresh()
    text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    lines = [line for line in re.split("[\r\n]+", text) if "scan 113" in line]
    assert lines and max(map(len, lines)) <= 80
    assert "scan 113 of 116: finding the par" in lines[-1] and re.search(r" 42/120 +left +[-:0-9]{7}", lines[-1])


def test_the_callback_gets_share_and_operation():
    calls = []
    with ProgressBar(total=4, enabled=False, callback=lambda *call: calls.append(call)) as stages:
        stages.begin_case("scan 1 of 2", 3)
        stages.show("reading the scan", "details")
        stages.done()
        stages.within(1, 4, "window")
        stages.done()
        stages.begin_case("scan 2 of 2", 1)  # the first did not need its third step
        stages.done()
    read, total = "reading the scan", 3
    assert calls == [(0, read), (1 / 4, read), (1.25 / 4, read), (2 / 4, read), (1, read)] and total == stages._total
