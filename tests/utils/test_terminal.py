"""Printing of names with control characters, in any encoding, into pipes that are closed."""

import io
import logging
import subprocess
import sys

import pytest

from diffdiscover3d.utils import terminal
from diffdiscover3d.utils.terminal import PrintableFormatter, printable, say, say_lines

HOSTILE = {
    "a\x1b[31mred.nii": r"a\x1b[31mred.nii",
    "two\nlines.nii": r"two\nlines.nii",
    "caf\udce9.nii": r"caf\udce9.nii",  # a byte that is not UTF-8, as `os.fsdecode` gives it
    "\x9b2Jcleared": r"\x9b2Jcleared",  # the 8-bit form of an escape sequence
    "\u202egnp.nii": r"\u202egnp.nii",  # right-to-left override
    "été µm 日本 😀": "été µm 日本 😀",
    "back\\slash": "back\\slash",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_printable(text, capsys):
    assert printable(text) == HOSTILE[text]
    say(text)
    say(text, error=True)
    assert capsys.readouterr() == (HOSTILE[text] + "\n", HOSTILE[text] + "\n")


def test_a_table_keeps_its_lines(capsys):
    say_lines("\none\x07\ntwo")
    assert capsys.readouterr().out == "\none\\x07\ntwo\n"


def test_log_messages_are_escaped_and_tracebacks_keep_their_lines():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("%s: note", "a\nb\x1b[2J")
    try:
        raise ValueError("x")
    except ValueError:
        logger.exception("failed")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == [r"a\nb\x1b[2J: note", "failed"] and lines[-1] == "ValueError: x"


def run(code: str, **options) -> subprocess.CompletedProcess:
    code = f"from diffdiscover3d.utils.terminal import prepare_streams, say; import sys, logging\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, **options)


def test_an_encoding_without_the_characters():
    done = run("prepare_streams(); say('caf\\u00e9 \\U0001f600')", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\xe9 \\U0001f600\n", b"")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_work_goes_on_after_the_reader_has_gone(tmp_path, stream):
    code = (
        "from diffdiscover3d.utils.terminal import prepare_streams, say; import logging\n"
        f"prepare_streams(); [say(n, error={stream == 'stderr'}) for n in range(20_000)]\n"
        f"[logging.getLogger('x').warning(n) for n in range(3)]; open({str(tmp_path / 'mark')!r}, 'w').write('done')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], **{stream: subprocess.PIPE})
    pipe = getattr(process, stream)
    assert pipe.readline() == b"0\n"
    pipe.close()
    assert process.wait(timeout=60) == 0 and (tmp_path / "mark").read_text() == "done"


def test_without_standard_output():
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{terminal_code()}" >&-'], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def terminal_code() -> str:
    return f"from {terminal.__name__} import prepare_streams, say; prepare_streams(); say(1)"
