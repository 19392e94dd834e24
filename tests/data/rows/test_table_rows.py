"""CSV and TSV, whose values are all text."""

from pathlib import Path

import pytest

from qst_tune.data.rows.json_rows import FileText
from qst_tune.data.rows.table_rows import CsvRows
from qst_tune.errors import UserError


def rows_of(path: Path, content: str | bytes, delimiter: str = ",") -> CsvRows:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return CsvRows(FileText(path), delimiter)


def test_quotes_hold_delimiters_and_lines(tmp_path: Path) -> None:
    content = '\ufeffinput,output\r\n"a, b","say ""hi""\nthere"\r\n\r\n007,nan\r\n'
    rows = rows_of(tmp_path / "r.csv", content)
    expected = [{"input": "a, b", "output": 'say "hi"\nthere'}, {"input": "007", "output": "nan"}]
    assert [rows[i] for i in range(len(rows))] == expected
    assert rows.place(1).endswith("r.csv (line 5)")


def test_tabs_separate_the_columns_of_tsv(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "r.tsv", "input\toutput\na, b\tc\n", "\t")
    assert rows[0] == {"input": "a, b", "output": "c"}


@pytest.mark.parametrize("values", ["a,b,c", "a"])
def test_row_with_another_number_of_fields_is_refused(values: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "r.csv", f"input,output\nx,y\n{values}\n")
    with pytest.raises(UserError, match=r"it has \d fields and the header 2 \(input, output\)"):
        rows[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("input,input\na,b\n", "the header names 'input' twice"),
        ("input;output\na;b\n", "the header 'input;output' has one column; separate"),
        ('input,output\n"a,b\n', "is not CSV at line 2: unexpected end of data"),
        (b"input,output\na,\xe9\n", "is not UTF-8|it is not UTF-8"),
    ],
)
def test_file_that_is_no_csv_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / "r.csv", content)


def test_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path / "r.csv", "input,output\n")) == 0
    assert len(rows_of(tmp_path / "r.csv", "")) == 0
