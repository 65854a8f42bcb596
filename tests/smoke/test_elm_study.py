"""`genlab bench elm-study --quick`, end to end."""

import json

import pytest

from genlab import cli


@pytest.mark.slow
def test_elm_study(tmp_path, picture_folder, capsys):
    page = tmp_path / "page.md"
    from eval.elm_findings import BEGIN, END

    page.write_text(f"# Mine\n{BEGIN}\nold\n{END}\nbehind\n")
    words = ["bench", "elm-study", "--quick", "--data", str(picture_folder), "--out", str(tmp_path / "study")]
    assert cli.main([*words, "--page", str(page)]) == 0
    out, err = capsys.readouterr()
    result = json.loads((tmp_path / "study" / "result.json").read_text())
    assert len(result["findings"]) == 9
    for finding in result["findings"]:
        assert finding["verdict"] in ("confirmed", "not confirmed", "not decidable here")
        assert finding["figures"]
        assert all(x["low"] <= x["value"] <= x["high"] for x in finding["figures"])
        assert finding["claim"] in out
        assert finding["claim"] in page.read_text()
    assert set(result["rows"]) == {
        "ar-bae-1x6", "mlm-bae-1x6", "ar-bae-2x3", "mlm-bae-2x3", "ar-vq", "mlm-vq", "ar-bae-2x3-xs",
    }  # fmt: skip
    equal = result["randomness"]["equal"]
    assert len({r["tokens"] for r in equal.values()}) == 1  # equally many tokens for all
    assert result["randomness"]["captions"] == "emoji"  # these pictures have none of their own
    assert page.read_text().startswith("# Mine")
    assert page.read_text().endswith("behind\n")
    assert "old" not in page.read_text()
    assert (tmp_path / "study" / "study.png").stat().st_size > 10_000
    steps = [line for line in err.splitlines() if line.startswith("[")]
    last, total = steps[-1][1:].split("]")[0].split("/")
    assert last == total  # progress counts what there is to do

    runs = sorted((tmp_path / "study").rglob("metrics.jsonl"))
    assert len(runs) == 9
    before = [path.stat().st_mtime_ns for path in runs]
    assert cli.main([*words, "--json"]) == 0  # everything is done already
    again = json.loads(capsys.readouterr().out)
    assert [path.stat().st_mtime_ns for path in runs] == before
    assert again["findings"] == result["findings"]
