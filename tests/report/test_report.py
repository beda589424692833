"""The report, the card and the summary: they say what the ledger says, tag what is not private, and survive any input."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from privimage_fast.dp.accounting import DPSGDEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.report import build_card, build_report, summary_table
from privimage_fast.report.heatmap import MAX_COLUMNS, heat_map
from privimage_fast.report.text import delta_text, epsilon_text, factor_text, for_markdown, metric_text

MakeRun = Callable[..., Path]
HOSTILE = (
    "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "a|b `code` [x](javascript:alert(1))", "{{ 7*7 }}",
    "naïve 猫 ‮abc", "line\nbreak\r\n# heading",
)  # fmt: skip

ODD = b'{"metrics": [3], "counts": 1e999, "query": {"seconds": 1e999}}'


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.open = 0
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.open = 0

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The first table row that begins with `first`."""
        return next([cell.strip() for cell in row] for row in self.rows if row and row[0].strip() == first)


def report(run: Path) -> Page:
    return Page(build_report(run).read_text(encoding="utf-8"))


def card(run: Path) -> str:
    return build_card(run).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- what it says


def test_one_epsilon_everywhere(make_run: MakeRun) -> None:
    run = make_run()
    expected = epsilon_text(Ledger.read(run / "ledger.jsonl").epsilon())
    page = report(run)
    assert expected == epsilon_text(float(re.search(r"unrounded it is ([\d.]+)", page.text)[1]))
    assert f"ε spent {expected} target 10" in page.text
    assert page.row("together")[-1] == page.row("PLD (dp-accounting)")[1] == expected
    assert f"| ε | {expected} (target 10) |" in card(run)
    assert re.search(rf"^ε +{re.escape(expected)} ", summary_table(run), re.MULTILINE)


def test_one_epsilon_follows_the_ledger_not_the_other_files(make_run: MakeRun) -> None:
    run = make_run(target=None)
    before = summary_table(run)
    with Ledger.resume(run / "ledger.jsonl") as ledger:
        ledger.charge(DPSGDEvent(1.0, 0.1, 30), stage="finetune")
        expected = epsilon_text(ledger.epsilon())
    assert expected not in before
    assert expected in summary_table(run) and expected in card(run) and expected in report(run).text


def test_full_run_shows_every_section(make_run: MakeRun) -> None:
    run = make_run()
    page = report(run)
    assert "has not run" not in page.text and "not finished" not in page.text
    assert not any(set((attrs.get("class") or "").split()) & {"banner"} for _, attrs in page.tags)
    assert page.row("cat") == ["cat", "A", "30"] and "embedded:letters" in page.text
    assert "Synthetic images 11 2 classes, 14×14×1" in page.text
    assert page.row("query")[2:6] == ["8", "–", "1", "1"] and ["dog", "4"] in page.rows
    assert page.row("fine-tuning: steps") == ["fine-tuning: steps", "5", "5", "equal"]
    assert page.row("fine-tuning: noise multiplier σ")[1:] == ["2", "2", "equal"]
    assert page.row("RDP (Opacus)")[2].startswith("+")
    assert page.row("pretrain") == ["pretrain", "1 min 04 s", "no"]
    assert page.row("evaluate") == ["evaluate", "not written", "yes, so its time is not written"]


def test_figures_of_an_earlier_synthetic_set_say_so(make_run: MakeRun) -> None:
    run = make_run()
    stages = json.loads((run / "stages.json").read_text())

    def outputs() -> list[str]:
        return [report(run).text, card(run), summary_table(run)]

    assert not any("earlier synthetic set" in text for text in outputs())
    (run / "stages.json").write_text(json.dumps(stages | {"sample": {"fingerprint": "other", "seconds": 1.0}}))
    for text in outputs():
        assert "earlier synthetic set" in text and "privimage evaluate --out" in text
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({"metrics": metrics["metrics"]}))  # an older version's: nothing is known
    assert not any("earlier synthetic set" in text for text in outputs())


def test_the_public_classifier_is_reported_and_a_poor_one_is_named(make_run: MakeRun) -> None:
    good = {"public_accuracy": 0.815, "chance": 0.02, "held_out": 1200, "near_chance": False}
    run = make_run(classifier=good)
    line = "names 81.5 % of 1,200 held-out public images right; always naming the commonest label: 2.0 %"
    assert line in report(run).text and "better than chance" not in report(run).text + card(run)
    run = make_run(classifier=good | {"public_accuracy": 0.021, "near_chance": True})
    assert "Hardly better than chance" in report(run).text and "hardly better than chance (2.1 %" in card(run)
    run = make_run(classifier={"public_accuracy": 0.3})  # of an older version
    assert "held-out public images" not in report(run).text and "cannot be read" not in report(run).text


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02" + bytes(7) + b"{}", b"\x04" + bytes(7) + b"null"])
def test_a_classifier_file_that_is_none_is_named(make_run: MakeRun, content: bytes) -> None:
    run = make_run(classifier={})
    (run / "checkpoints" / "classifier.safetensors").write_bytes(content)
    assert "checkpoints/classifier.safetensors: cannot be read" in report(run).text


def test_sheets_are_embedded_whole_and_the_sensitive_one_is_not(make_run: MakeRun) -> None:
    run = make_run()
    page = report(run)
    embedded = [base64.b64decode(a["src"].removeprefix("data:image/png;base64,")) for tag, a in page.tags if tag == "img"]
    assert embedded == [(run / "samples" / f"{name}.png").read_bytes() for name in ("before", "after", "public")]
    assert page.row("Nearest sensitive images")[2] == "not private" and "Not shown here" in page.text


def test_chosen_cells_are_outlined(make_run: MakeRun) -> None:
    html = build_report(make_run()).read_text(encoding="utf-8")
    chosen = re.search(r'<g class="chosen">(.*?)</g>', html, re.DOTALL)[1]
    assert chosen.count("<rect") == 2
    assert re.search(r"<title>cat → A: 40\.5</title>", html) and 'fill-opacity="0.00"><title>cat → B: -3.0' in html


def test_metrics_are_tagged_and_accuracy_comes_first(make_run: MakeRun) -> None:
    run = make_run()
    page = report(run)
    assert page.row("accuracy")[1:3] == ["78.4 %", "not private"]
    assert page.row("distance on real")[1:3] == ["3.25", "not private"]
    assert page.row("accuracy on synthetic")[1:3] == ["n/a", "private"]
    assert "Accuracy 78.4 % not private" in page.text  # the strip
    summary = summary_table(run).splitlines()
    tagged = [line.split() for line in summary if line.endswith("private")]
    assert [line[0] for line in tagged] == ["accuracy", "accuracy", "distance"]
    assert [line[-2:] for line in tagged] == [["NOT", "private"], ["n/a", "private"], ["NOT", "private"]]
    assert "| accuracy | 78.4 % | **not private** |" in card(run) and "| accuracy on synthetic | n/a | private |" in card(run)


def test_a_metric_that_does_not_say_it_is_private_is_not(make_run: MakeRun) -> None:
    run = make_run()
    metrics = [{"name": "silent", "value": 1}, {"name": "odd", "value": 2, "private": "yes"}]
    (run / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    page = report(run)
    assert page.row("silent")[2] == page.row("odd")[2] == "not private"
    assert summary_table(run).count("NOT private") == 2


def test_the_page_names_all_that_is_not_private_on_it(make_run: MakeRun) -> None:
    run = make_run()
    assert "It does contain what is marked not private: metrics. Leave that out" in report(run).text
    assert report(run).row("Running times")[2] == "covered"
    (run / "metrics.json").write_text(json.dumps({"metrics": [{"name": "own", "value": 1, "private": True}]}))
    assert (
        "contains no sensitive image, unless one is in the public set" in report(run).text
        and "does contain" not in report(run).text
    )
    stages = json.loads((run / "stages.json").read_text())
    stages["finetune"]["seconds"] = 3.0
    (run / "stages.json").write_text(json.dumps(stages))
    page = report(run)
    assert "It does contain what is marked not private: running times. Leave that out" in page.text
    assert page.row("Running times")[2] == "not private"
    assert ["finetune", "3.0 s", "yes, time not private"] in [[cell.strip() for cell in row] for row in page.rows]


def test_the_card_names_no_private_folder(make_run: MakeRun) -> None:
    text = card(make_run())
    assert "| sensitive set | patients (not included) |" in text and "/home/ward" not in text


# ------------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({"seeded": True, "target": None}, "NOT PRIVATE: seeded test mode"),
        ({"sigma": 0.0, "target": None}, "NO PRIVACY: ε is infinite"),
    ],
)
def test_runs_that_protect_nobody_say_so(make_run: MakeRun, options: dict, title: str) -> None:
    run = make_run(**options)
    page, summary = report(run), summary_table(run)
    assert any(tag == "div" and attrs.get("class") == "banner" for tag, attrs in page.tags)
    assert title in page.text and f"> **{title}**" in card(run) and f"!! {title}" in summary
    # Nothing is called covered or private any more, in any of the three.
    assert page.row("Synthetic images")[2] == "no guarantee" and page.row("accuracy on synthetic")[2] == "not private"
    assert "| covered |" not in card(run) and "| private |" not in card(run)
    assert all("NOT private" in line for line in summary.splitlines() if line.endswith("private"))
    if math.isinf(Ledger.read(run / "ledger.jsonl").epsilon()):
        assert "ε spent ∞" in page.text and "| ε | ∞ |" in card(run) and re.search(r"^ε +∞", summary, re.MULTILINE)


def test_a_sound_run_has_no_banner(make_run: MakeRun) -> None:
    run = make_run()
    assert "NOT PRIVATE:" not in report(run).text and "NO PRIVACY" not in card(run) and "!!" not in summary_table(run)


def test_replays_are_shown_and_charged(make_run: MakeRun) -> None:
    run = make_run(steps=8, target=None)
    page = report(run)
    assert page.row("fine-tuning: steps") == [
        "fine-tuning: steps", "5", "8", "3 steps repeated after an interruption, charged again"
    ]  # fmt: skip
    assert "Replays. Fine-tuning: 3 steps repeated" in re.sub(r"\s+", " ", page.text)
    assert "3 steps repeated" in card(run) and "3 steps repeated" in summary_table(run)
    assert page.row("finetune")[5] == "8"


def test_fewer_steps_charged_than_the_model_took_is_an_alarm(make_run: MakeRun) -> None:
    run = make_run(steps=3, target=None)
    assert "LEDGER AND RUN DISAGREE" in report(run).text and "!! LEDGER AND RUN DISAGREE" in summary_table(run)


def test_a_plan_with_another_sigma_is_an_alarm(make_run: MakeRun) -> None:
    run = make_run()
    budget = json.loads((run / "budget.json").read_text())
    (run / "budget.json").write_text(json.dumps({**budget, "noise_multiplier": 2.5}))
    page = report(run)
    assert page.row("fine-tuning: noise multiplier σ")[3] == "DIFFERS" and "LEDGER AND RUN DISAGREE" in page.text


@pytest.mark.parametrize(
    ("taken", "planned", "text"),
    [(55, 55, "55"), (51, 55, "51 of 55 planned: repeated steps took the rest of the budget"), (7, None, "7")],
)
def test_the_steps_that_the_model_took_are_said(make_run: MakeRun, taken: int, planned: int | None, text: str) -> None:
    run = make_run()
    assert "oised steps" not in report(run).text + card(run) + summary_table(run)
    (run / "checkpoints").mkdir()
    metadata = {"privimage": json.dumps({"fingerprint": "f", "steps": taken})}
    save_file({"weight": np.zeros(3, np.float32)}, run / "checkpoints" / "finetune.safetensors", metadata=metadata)
    if planned:
        (run / "config.yaml").write_text(f"finetune: {{steps: {planned}}}\n")
    assert f"Noised steps that the model took: {text}." in report(run).text
    assert f"| noised steps of the model | {text} |" in card(run)
    assert ["noised", "steps", *text.split()] in [line.split() for line in summary_table(run).splitlines()]


def test_an_edited_ledger_gives_no_epsilon(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "ledger.jsonl"
    path.write_text(path.read_text().replace('"noise_multiplier": 2.0', '"noise_multiplier": 9.0', 1))
    page = report(run)
    assert "NO STATEMENT: the ledger is damaged" in page.text and "line 3" in page.text and str(run) not in page.text
    assert "ε spent unknown" in page.text and "| ε | unknown |" in card(run)
    assert page.row("Synthetic images")[2] == "no guarantee"


# --------------------------------------------------------------------------------------------------- partial, bad, hostile


def test_a_run_stopped_before_fine_tuning_says_what_has_not_run(make_run: MakeRun) -> None:
    run = make_run(steps=0, target=None)
    for name in ("metrics.json", "synthetic.npz", "samples/after.png", "samples/before.png", "budget.json"):
        (run / name).unlink()
    done = json.loads((run / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps({s: done[s] for s in ("query", "select")}))
    page = report(run)
    for stage in ("pretrain", "sample", "evaluate"):
        assert f"the stage {stage} has not run" in page.text
    assert "the stage query has not run" not in page.text and "NOT PRIVATE" not in page.text
    assert "not run yet       pretrain, finetune, sample" in summary_table(run)
    assert "the stage sample has not run" in card(run)
    assert epsilon_text(Ledger.read(run / "ledger.jsonl").epsilon()) in card(run)


def test_an_interrupted_fine_tuning_is_no_alarm(make_run: MakeRun) -> None:
    run = make_run(steps=2, target=None)
    done = json.loads((run / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps({s: done[s] for s in ("query", "select", "pretrain")}))
    page = report(run)
    assert page.row("fine-tuning: steps")[3] == "3 still to do" and "DISAGREE" not in page.text


def test_an_empty_folder_gives_a_report_and_no_promise(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert "NO STATEMENT: the ledger is missing" in page.text and "the stage query has not run" in page.text
    assert "| ε | unknown |" in card(tmp_path) and "unknown" in summary_table(tmp_path)


def test_results_without_a_ledger_are_called_not_private(make_run: MakeRun) -> None:
    run = make_run()
    (run / "ledger.jsonl").unlink()
    assert "treat everything in it as not private" in report(run).text and "covered" not in card(run)


def test_a_hostile_folder_name(make_run: MakeRun) -> None:
    run = make_run(name="a|b `c` <i>")
    assert card(run).startswith("# Synthetic image set a\\|b \\`c\\` &lt;i&gt;\n")
    assert not [tag for tag, _ in report(run).tags if tag == "i"]


def test_no_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_report(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", ODD, b"\xff\xfe\0"])
def test_damaged_files_are_named_and_the_rest_is_shown(make_run: MakeRun, content: bytes) -> None:
    run = make_run()
    names = ["query.json", "selection.json", "budget.json", "metrics.json", "stages.json", "config.yaml", "synthetic.npz"]
    for name in (*names, "samples/after.png"):
        (run / name).write_bytes(content)
    page, text, summary = report(run), card(run), summary_table(run)
    expected = epsilon_text(Ledger.read(run / "ledger.jsonl").epsilon())
    assert expected in page.text and expected in text and expected in summary
    tolerated = {("config.yaml", b""), ("config.yaml", ODD), ("budget.json", ODD)}  # mappings that lack what is looked for
    for name in (*names, "samples/after.png"):
        assert (f"{name}: cannot be read" in page.text) != ((name, content) in tolerated)


class Planted:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickled_labels_are_not_loaded(make_run: MakeRun) -> None:
    run = make_run()
    planted = np.array([Planted(run / "planted")], dtype=object)
    np.savez(run / "synthetic.npz", images=np.zeros((1, 8, 8, 1), np.uint8), labels=planted)
    assert "synthetic.npz: cannot be read" in report(run).text
    assert not (run / "planted").exists()


def make_hostile(make_run: MakeRun, name: str) -> Path:
    """A run in which everything that a user can name is called `name`."""
    run = make_run(classes=(name, "dog"), labels=(name + "!", "B", "C"), metric=f"accuracy {name}")
    selection = json.loads((run / "selection.json").read_text())
    (run / "selection.json").write_text(json.dumps({**selection, "mode": name}))
    return run


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(make_run: MakeRun, name: str) -> None:
    plain = report(make_run())
    run = make_hostile(make_run, name)
    page = report(run)
    # The same tags with the same attributes (but for texts' coordinates) as with harmless names.
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    shown = name.replace("\n", "�").replace("\r", "�").replace("‮", "�")
    assert shown in page.text and "‮" not in page.text and "49" not in page.row(f"accuracy {shown}")[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_do_not_break_the_card(make_run: MakeRun, name: str) -> None:
    plain, hostile = card(make_run()).splitlines(), card(make_hostile(make_run, name)).splitlines()
    assert len(plain) == len(hostile)  # no line was added or ended
    for before, after in zip(plain, hostile, strict=True):
        assert len(re.findall(r"(?<!\\)\|", before)) == len(re.findall(r"(?<!\\)\|", after))
        assert len(re.findall(r"(?<!\\)`", before)) == len(re.findall(r"(?<!\\)`", after))
    assert "<" not in "\n".join(hostile) and not re.search(r"(?<!\\)\]\(", "\n".join(hostile))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a|b", r"a\|b"),
        ("`x`", r"\`x\`"),
        ("<b>&", "&lt;b&gt;&amp;"),
        (r"\|", r"\\\|"),
        ("https://x.y", "https&#58;//x.y"),
        ("www.x.y", "www&#46;x.y"),
        ("a\nb", "a�b"),
        ("![i](u)", r"\!\[i\](u)"),
    ],
)
def test_markdown_escapes(name: str, expected: str) -> None:
    assert for_markdown(name) == expected


def test_nothing_is_loaded_from_outside(make_run: MakeRun) -> None:
    run = make_run()
    with (run / "config.yaml").open("a") as file:
        file.write("note: <script src=https://evil.example/x.js></script>\n")
    html = build_report(run).read_text(encoding="utf-8")
    page = Page(html)
    loads = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
    loading = [attrs[key] for _, attrs in page.tags for key in loads if key in attrs]
    assert loading and all(value.startswith("data:image/png;base64,") for value in loading)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "@import" not in html and "url(" not in html
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert html.count("https://") == 1 and "http://" not in html  # the one above, as text


# --------------------------------------------------------------------------------------------------------------- pieces


def test_bounds_are_rounded_up() -> None:
    assert epsilon_text(9.99711) == "9.9972" and epsilon_text(10.0) == "10.0000" and epsilon_text(1e-9) == "0.0001"
    assert (
        delta_text(3.01420911193057e-05) == "3.0143e-05"
        and delta_text(2.0**-14) == "6.1036e-05"
        and delta_text(1e-4) == "1.0000e-04"
    )
    assert factor_text(1.0) == "2.72" and factor_text(9.9972) == "22,000" and factor_text(0.0) == "1.00"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 10**400, True, "0.5", [1]])
def test_what_is_no_number_is_not_available(value: object) -> None:
    assert metric_text(value, "fraction") == "n/a" and metric_text(0.5, "fraction") == "50.0 %"


def test_a_large_histogram_is_cut_and_says_so() -> None:
    counts = np.arange(2 * 500, dtype=float).reshape(2, 500)
    names = [f"label {i}" for i in range(500)]
    selection = {"classes": [{"class": "a", "labels": ["label 3"], "images": 1}]}
    heat = heat_map({"counts": counts, "labels": names, "classes": ["a", "b"]}, selection)
    assert len(heat.cells) == 2 * MAX_COLUMNS and heat.left_out == f"{500 - MAX_COLUMNS} of 500 labels"
    assert heat.columns[0][2] == "label 3" and heat.columns[1][2] == "label 499"  # chosen first, then the largest
    assert [cell.title for cell in heat.chosen] == ["a → label 3: 3.0"]


def test_summary_and_card_import_no_torch(make_run: MakeRun) -> None:
    run = make_run()
    code = f"""
import sys
from pathlib import Path
from privimage_fast.report import build_card, summary_table
summary_table(Path({str(run)!r})), build_card(Path({str(run)!r}))
assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
