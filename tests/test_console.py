"""Several texts on one output."""

from jpd.console import LinePrinter


def test_line_printer_breaks_lines_and_keeps_all_text(capsys):
    printer = LinePrinter(width=20)
    text = "one two three four five six seven\n\neight " + "x" * 45
    for character in text:
        printer.write("[0]", character)
        printer.write("[1]", character)
    printer.end("[0]", "length")
    lines = capsys.readouterr().out.splitlines()
    own = [line.removeprefix("[0] ") for line in lines if line.startswith("[0] ")]
    assert all(len(line) <= 20 for line in own[:-1])
    assert own[-1].endswith(" (length)")
    assert "".join("".join(own).split()) == "".join(text.split()) + "(length)"
