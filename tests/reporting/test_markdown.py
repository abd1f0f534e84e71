"""Markdown tables compared with tables written by hand."""

import pytest

from diffdiscover3d.reporting.markdown import markdown_table


def test_a_table_written_by_hand():
    found = markdown_table(["level", "Dice", ""], [(1, "0.970", "met"), (2, "a|b", "")])
    assert found == "| level | Dice |  |\n| --- | --- | --- |\n| 1 | 0.970 | met |\n| 2 | a\\|b |  |"


def test_rows_have_the_cells_of_the_header():
    with pytest.raises(ValueError, match="must have 2 cells"):
        markdown_table(["a", "b"], [("1", "2", "3")])
