"""The pages' numbers are those of their cells, and one that is not is found."""

import claims
import pandas as pd
import pytest


def test_every_number_of_the_pages_is_that_of_its_cell(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claims.py"])
    claims.main()
    assert "every number" in capsys.readouterr().out


@pytest.fixture
def made(tmp_path, monkeypatch):
    row = {"model": "LoRA", "rate": "rank1", "yaw": "all", "mean": 0.1526, "half": 0.0124}
    pd.DataFrame([row]).to_csv(tmp_path / "rates.csv", index=False)
    of_two = {"family": "f", "model": "LoRA", "other": "base", "p_holm": 0.0213} | row | {"mean": -0.0042}
    pd.DataFrame([of_two]).to_csv(tmp_path / "differences.csv", index=False)
    monkeypatch.setattr(claims, "CONTROL_RESULTS", tmp_path)
    claims.read.cache_clear()
    yield
    claims.read.cache_clear()


RATE, APART = "<!-- rates · LoRA · rank1 · all -->", "<!-- differences · f · LoRA · base · rank1 · all -->"


@pytest.mark.parametrize(
    "text",
    [f".153{RATE}", f"+.153 ± .012{RATE}", f"**.15**{RATE}", f"−.004 ± .012, p .021{APART}", f"−.004, p < .03{APART}"],
)
def test_a_right_number_passes(made, text):
    assert list(claims.wrong_numbers(text)) == [] == list(claims.unmarked(text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f".154{RATE}", "0.15260"),
        (f"-.153{RATE}", "0.15260"),
        (f".153 ± .013{RATE}", "0.01240"),
        (f"−.004, p .022{APART}", "0.02130"),
        (f"−.004, p < .02{APART}", "0.02130"),
        (f"many{RATE}", "no number before"),
        (".153<!-- rates · LoRA · rank1 · 0-45 -->", "0 rows"),
        (".153<!-- rates · LoRA · rank1 · all · median -->", "no column median"),
        (".153<!-- rates · LoRA -->", "wants model, rate, yaw"),
    ],
)
def test_a_wrong_number_is_found(made, text, problem):
    (found,) = claims.wrong_numbers(f"a line\n{text}")
    assert found.startswith("line 2") and problem in found


def test_a_number_without_a_cell_is_found():
    text = "rank-1 is .944 ± .008, version 2.11.0, p < .05 and\n```\n.944\n```\n`lr=.001` [x](a.123)\n"
    assert [found.split(":")[0] for found in claims.unmarked(text)] == ["line 1"] * 3
    assert list(claims.unmarked("8 of 10, 1.25 s, 0.13 M")) == []


def test_a_table_is_written_from_its_cells_and_a_changed_one_is_found(made):
    written = "".join(
        f"<!-- table differences · f · rank1 all -->\n{claims.table_of('differences', 'f · rank1 all')}<!-- end -->"
    )
    assert "| LoRA | base | **−.004 ± .012, p .021** |" in written
    assert list(claims.wrong_tables(written)) == []
    assert len(list(claims.wrong_tables(written.replace(".021", ".001")))) == 1
