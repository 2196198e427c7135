"""The page and the model card say what the result says, alone, and pass nothing through unescaped."""

import ast
import copy
import functools
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankrace.config import RunConfig
from rankrace.report import write_card, write_report
from rankrace.report.canvas import NARROW, PALETTE, WIDE, Format
from rankrace.report.card import prose
from rankrace.report.figures import averaged, looks, loss_against_rank, loss_against_step, measured
from rankrace.report.page import render_report
from rankrace.report.text import count, duration, lora_config_code, percent, warnings
from rankrace.result import Result, Series

GOLDEN = json.loads((Path(__file__).parent / "data" / "result_v1.json").read_text(encoding="utf-8"))
CONFIG = RunConfig(model="org/base", data="rows.jsonl", out=Path("runs/x")).model_dump(mode="json")
EVIL = "<script>alert(1)</script>/`*_[x](y)|\" '"


def result(**changes: Any) -> Result:
    return Result.model_validate(copy.deepcopy(GOLDEN) | changes)


def diverged() -> Result:
    changed = copy.deepcopy(GOLDEN)
    changed["curve"].append(
        {"rank": 128, "loss": math.nan, "se": None, "penalty": None, "objective": math.inf}
        | {"source": "direct", "step": 36}
    )
    changed["candidates"].append({"rank": 128, "status": "diverged", "steps": 9})
    runaway = [1.6 * 2**step for step in range(8)] + [math.nan]
    changed["history"].append({"rank": 128, "steps": list(range(1, 10)), "losses": runaway})
    changed["looks"][0]["losses"] = [math.nan] * 7
    return Result.model_validate(changed)


def lone() -> Result:
    point = {
        "rank": 3,
        "loss": 0.7,
        "se": None,
        "penalty": 0.0,
        "objective": 0.7,
        "source": "direct",
        "step": 0,
    }
    return result(
        rank=3,
        curve=[point],
        looks=[],
        history=[],
        accuracy={},
        candidates=[{"rank": 3, "status": "winner", "steps": 1}],
    )


def crowded() -> Result:
    points = [
        {"rank": rank, "loss": 0.7 + 0.1 / rank, "se": 0.001, "penalty": 0.01, "objective": 0.71 + 0.1 / rank}
        | {"source": "truncated", "step": 36}
        for rank in range(1, 61)
    ]
    history = [{"rank": 32, "steps": list(range(5000)), "losses": [1.0] * 5000}]
    return result(curve=points, history=history)


def evil() -> Result:
    return result(
        model=EVIL,
        reason=EVIL,
        strategy=EVIL,
        target_modules=[EVIL],
        notes=[EVIL],
        versions={EVIL: EVIL},
        data=GOLDEN["data"] | {"sha256": EVIL},
        rank_pattern={EVIL: 4},
    )


CASES = {"usual": result, "diverged": diverged, "lone": lone, "crowded": crowded, "evil": evil}


class Page(HTMLParser):
    """Collects what the tests ask about: attributes, text by enclosing tag, and whether tags balance."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}  # noqa: RUF012

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.stack:
            self.texts.append((self.stack[-1], data.strip()))

    def text(self) -> str:
        return " ".join(" ".join(text.split()) for tag, text in self.texts if tag != "style")


@functools.cache
def page(case: str) -> tuple[str, Page]:
    html = render_report(CASES[case](), CONFIG | {"data": EVIL}, adapter="runs/x/adapter")
    return html, Page(html)


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_loads_nothing(case: str):
    html, parsed = page(case)
    assert parsed.stack == []
    tags = {tag for tag, _, _ in parsed.attributes}
    assert not tags & {"script", "img", "link", "iframe", "object"}
    for tag, name, value in parsed.attributes:
        if name in {"src", "href", "xlink:href", "data", "action"}:
            assert value.startswith("#"), f"<{tag} {name}={value}>"
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "default-src 'none'" in html
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)", html) + re.findall(r'href="#([^"]*)"', html)
    assert references
    assert set(references) <= set(ids)
    assert "nan" not in re.findall(r"\bnan\b", parsed.text().lower())


def test_the_headline_says_the_choice_and_what_it_gave():
    html, parsed = page("usual")
    heading = re.search(r"<h1>(.*?)</h1>", html)
    assert heading is not None
    assert re.sub("<.*?>", "", heading[1]) == "Chosen rank: 32"
    text = parsed.text()
    for said in (
        GOLDEN["reason"],
        "1.6871 → 0.6413",
        "2.1% → 9.4%",
        "9.77 M",
        "of 135 M; 2× an r=16 adapter",
        "6 min 52 s",
    ):
        assert said in text, said


def test_the_costs_add_up():
    cells = [text for tag, text in page("usual")[1].texts if tag == "td"]
    start = cells.index("Loading and training")
    assert cells[start : start + 11] == [
        *("Loading and training", "6 min 16 s", "91%"),
        *("Search", "11.3 s", "2.7%"),
        *("Evaluation", "24.8 s", "6.0%"),
        *("Total", "6 min 52 s"),
    ]


def test_an_unmeasured_accuracy_is_not_mentioned():
    said = "Whole answers right"
    assert said in page("usual")[1].text()
    assert said not in page("lone")[1].text()


def test_the_resolved_configuration_is_on_the_page():
    folded = re.search(r"config\.yaml</summary>\s*<pre>(.*?)</pre>", page("usual")[0], re.DOTALL)
    assert folded is not None
    assert yaml.safe_load(unescape(folded[1])) == CONFIG | {"data": EVIL}


def test_what_others_wrote_is_escaped():
    html, parsed = page("evil")
    assert "<script" not in html
    assert parsed.text().count("<script>alert(1)</script>") >= 8


def test_the_page_is_written_beside_the_adapter_it_names(tmp_path: Path):
    write_report(lone(), CONFIG, tmp_path / "report.html")
    assert str(tmp_path / "adapter") in unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


WARNED = GOLDEN["decision"]
UP_TO_32 = [point for point in GOLDEN["curve"] if point["rank"] <= 32]


def learnt_then(gain: float | None, *, base: float, final: float) -> Result:
    """At the decision by so much, on the examples that chose; in the end on fresh ones."""
    loss = {"base": base, "final": final, "final_se": None}
    return result(decision=WARNED | {"gain": gain}, loss=loss)


@pytest.mark.parametrize(
    ("shown", "start"),
    [
        (result(decision=WARNED | {"edge": "high"}), "Edge of the search: 32 is near 64, the largest"),
        (result(decision=WARNED | {"edge": "high"}, curve=UP_TO_32), "Edge of the search: 32 is the largest"),
        (result(decision=WARNED | {"edge": "low"}), "Edge of the search: 32 is the smallest"),
        (result(decision=WARNED | {"edge": "high", "confident": False}), "Edge of the search: 32 is near 64"),
        (result(decision=WARNED | {"capped": True}), "Decided at the limit"),
        (result(decision=WARNED | {"confident": False}), "Not confident"),
        (result(loss={"base": 0.5, "final": 0.5, "final_se": None}), "No gain"),
        (learnt_then(3.2, base=4.0, final=5.1), "Lost again: at "),
        (learnt_then(3.2, base=4.0, final=2.5), "Lost again: at "),
        (learnt_then(-0.1, base=4.0, final=4.1), "No gain"),
        (diverged(), "Diverged: rank 128 was"),
    ],
)
def test_each_doubt_is_said_plainly_and_alone(shown: Result, start: str, tmp_path: Path):
    (said,) = warnings(shown)
    assert said.startswith(start)
    write_card(shown, CONFIG, tmp_path / "README.md")
    assert prose(said) in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_of_one_rank_at_two_rates_the_one_that_diverged_is_named():
    changed = copy.deepcopy(GOLDEN)
    rank = changed["candidates"][0]["rank"]
    changed["candidates"].append({"rank": rank, "status": "diverged", "steps": 3, "lr_scale": 1e30})
    changed["history"].append({"rank": rank, "steps": [1, 2, 3], "losses": [1.5, 9.0, math.nan], "lr_scale": 1e30})
    shown = Result.model_validate(changed)
    (said,) = warnings(shown)
    assert said.startswith(f"Diverged: rank {rank} at 1e+30 × lr was removed")
    drawn = loss_against_step(shown, WIDE)
    assert drawn.count("(diverged)") == 1
    assert f"rank {rank} at 1e+30 × lr (diverged)" in drawn


def test_several_that_diverged_are_listed():
    """A twin has a comma of its own in its name."""
    changed = copy.deepcopy(GOLDEN)
    rank = changed["candidates"][0]["rank"]
    lost = {"rank": rank, "status": "diverged", "steps": 3}
    changed["candidates"] += [lost | {"lr_scale": 4}, lost | {"twin": True}]
    (two,) = warnings(Result.model_validate(changed))
    assert two.startswith(f"Diverged: rank {rank} at 4 × lr and rank {rank}, twin were removed")
    changed["candidates"].append(lost | {"rank": 128})
    (three,) = warnings(Result.model_validate(changed))
    assert three.startswith(f"Diverged: rank {rank} at 4 × lr, rank {rank}, twin and rank 128 were removed")


def test_the_page_says_the_doubts():
    assert warnings(diverged())[0] in page("diverged")[1].text()


def test_what_other_examples_would_have_chosen_is_said_once_it_is_known(tmp_path: Path):
    for low, high, words in ((11, 32, "ranks 11 to 32"), (32, 32, "rank 32")):
        found = result(decision=GOLDEN["decision"] | {"interval": [low, high]})
        said = f"The rule would pick {words} in 95% of bootstrap samples of the held-out examples."
        assert said in Page(render_report(found, CONFIG, adapter="a")).text()
        assert said in card(found, tmp_path)[1]
    assert "bootstrap" not in card(result(), tmp_path)[1]


def test_a_clean_run_has_no_warning():
    assert warnings(result()) == []


def test_gains_are_compared_each_on_its_own_examples():
    """Those of the report are harder here than those that chose: 0.769 then, which was 0.3 below the base."""
    assert next(p["loss"] for p in GOLDEN["curve"] if p["rank"] == 32) == pytest.approx(0.769, abs=1e-4)
    assert warnings(learnt_then(0.3, base=1.687, final=1.4)) == []
    assert warnings(learnt_then(0.3, base=1.687, final=1.54))[0].startswith("Lost again: at ")
    # And easier here, where half of what was learnt is lost again although the loss is lower than it was.
    assert warnings(learnt_then(0.3, base=0.7, final=0.65))[0].startswith("Lost again: at ")


def test_what_may_be_chance_is_not_called_lost():
    """0.34 nats gained on the examples that chose, 0.22 ± 0.28 lost on forty others: nobody knows."""
    for error, start in ((0.28, "No gain: "), (0.05, "Lost again: ")):
        found = result(
            decision=WARNED | {"gain": 0.34},
            loss={"base": 0.69, "final": 0.91, "final_se": 0.28, "gain_se": error, "examples": 40},
            accuracy={"base": 0.55, "final": 0.78, "final_se": 0.066},
        )
        (said,) = warnings(found)
        assert said.startswith(start)
        assert f"0.2200 ± {error:.4f}" in said
        text = Page(render_report(found, CONFIG, adapter="a")).text()
        assert "± 0.2800 standard error, 40 examples" in text
        assert "± 6.6% standard error" in text


def test_a_record_of_before_there_was_a_gain_is_not_said_to_have_lost_it():
    assert warnings(learnt_then(None, base=1.687, final=1.6)) == []


def test_drawings_are_deterministic_and_themed():
    assert loss_against_rank(result(), WIDE) == loss_against_rank(result(), WIDE)
    for form in (WIDE, NARROW):
        drawing = loss_against_rank(result(), form)
        for role, (light, _) in PALETTE.items():
            assert drawing.count(light) == drawing.count(f"var(--{role}, {light})")
        assert "var(--accent" in drawing
        assert f'class="{form.name}"' in drawing


@pytest.mark.parametrize("form", [WIDE, NARROW], ids=lambda form: form.name)
def test_the_rank_figure_marks_the_choice_on_integer_ticks(form: Format):
    words = re.findall(r"<text[^>]*>([^<]*)</text>", loss_against_rank(result(), form))
    assert "chosen: 32" in words
    assert {"1", "2", "4", "8", "16", "32", "64"} <= set(words)
    assert "cut from a wider candidate" in words
    assert "trained at this rank" not in words


def test_the_step_figure_names_every_candidate_and_the_decision():
    words = re.findall(r"<text[^>]*>([^<]*)</text>", loss_against_step(diverged(), WIDE))
    assert {"rank 32", "rank 64", "rank 128 (diverged)", "rank fixed"} <= set(words)
    ticks = [float(word) for word in words if re.fullmatch(r"\d\.\d+", word)]
    assert max(ticks) < 3, "a runaway candidate must not set the scale"


def test_the_looks_figure_tells_two_kinds_of_look_at_one_step_apart():
    direct = GOLDEN["looks"][-1] | {"source": "direct"}
    words = re.findall(r"<text[^>]*>([^<]*)</text>", looks(result(looks=[*GOLDEN["looks"], direct]), WIDE))
    assert {"step 12, truncated", "step 36, truncated", "step 36, direct"} <= set(words)


def test_bins_average_the_same_steps_for_every_candidate():
    series = Series(rank=4, steps=[1, 2, 3, 4, 5], losses=[1.0, 3.0, None, 5.0, 7.0])
    assert averaged(series, lambda step: step // 2) == ([1.0, 2.0, 4.5], [1.0, 3.0, 6.0])


def test_points_without_a_loss_and_older_ones_are_left_out():
    doubled = copy.deepcopy(GOLDEN["curve"])
    doubled.append(doubled[3] | {"loss": 9.0, "step": 1})
    doubled.append(doubled[3] | {"rank": 128, "loss": None})
    assert [(point.rank, point.loss) for point in measured(result(curve=doubled).curve)] == [
        (point["rank"], point["loss"]) for point in GOLDEN["curve"]
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9999, "9,999"), (12345, "12.3 k"), (2433024, "2.43 M"), (6.74e9, "6.74 B")],
)
def test_counts(number: float, text: str):
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (59.94, "59.9 s"), (119.7, "2 min 00 s"), (3661, "1 h 01 min")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0%"), (0.021, "2.1%"), (0.5, "50%"), (1, "100%")])
def test_percents(share: float, text: str):
    assert percent(share) == text


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_the_lora_config_makes_an_adapter_of_that_rank_and_multiplier(scaling: str):
    peft = pytest.importorskip("peft")
    shown = result(rank=12, scaling=2.5, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
    names: dict[str, Any] = {}
    exec(
        compile(lora_config_code(shown, CONFIG | {"scaling": scaling, "dropout": 0.05}), "snippet", "exec"),
        names,
    )
    made = names["lora_config"]
    assert isinstance(made, peft.LoraConfig)
    assert (made.r, made.lora_dropout, made.rank_pattern) == (12, 0.05, {"v_proj": 4})
    assert made.target_modules == {"q_proj", "v_proj"}
    assert made.lora_alpha / (12**0.5 if scaling == "rslora" else 12) == pytest.approx(2.5)
    assert made.alpha_pattern["v_proj"] / (4**0.5 if scaling == "rslora" else 4) == pytest.approx(2.5)
    assert made.use_rslora == (scaling == "rslora")


def card(shown: Result, folder: Path) -> tuple[dict[str, Any], str]:
    write_card(shown, CONFIG, folder / "README.md")
    whole = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert whole is not None
    return yaml.safe_load(whole[1]), whole[2]


def test_the_card_says_what_how_and_why(tmp_path: Path):
    front, body = card(result(), tmp_path)
    assert front["base_model"] == GOLDEN["model"]
    assert front["library_name"] == "peft"
    assert "lora" in front["tags"]
    assert "license" not in front
    assert "--max-lora-rank 32" in body
    assert GOLDEN["reason"] in body
    assert "| 32 | 0.7690 |" in body
    assert "1.6871 | 0.6413 ± 0.0061" in body
    for block in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        ast.parse(block)
    assert body.count("```") % 2 == 0


def test_a_classifier_s_card_loads_a_classifier(tmp_path: Path):
    front, body = card(result(task="classification", labels=["no", "yes", "maybe"]), tmp_path)
    assert front["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification" in body
    assert "id2label={0: 'no', 1: 'yes', 2: 'maybe'}" in body
    assert "vllm" not in body


def test_the_card_escapes_markup_and_keeps_its_front_matter(tmp_path: Path):
    evil = "a: b\n---\n# <img src=x> ```"
    front, body = card(result(model=evil, reason=evil, notes=[EVIL]), tmp_path)
    assert front["base_model"] == evil
    prose_only = re.sub(r"```(?:python|sh)\n.*?```\n", "", body, flags=re.DOTALL)
    assert "<img" not in prose_only
    assert "<script" not in prose_only
    assert r"\`" in prose_only


def test_the_page_begins_with_the_choice_and_a_name() -> None:
    said = "ranks 2 to 16 cannot be told apart; rank 1 is behind; measured on 64 held-out examples: the only look."
    page = render_report(result(model="/home/someone/models/Small-1B", reason=said), {}, adapter="a")
    assert '<p class="reason">Ranks 2 to 16 cannot be told apart; rank 1 is behind.</p>' in page
    assert '<p class="aside">Measured on 64 held-out examples: the only look.</p>' in page
    assert '<span title="/home/someone/models/Small-1B">Small-1B</span>' in page
    plain = render_report(result(model="org/name", reason="it was given"), {}, adapter="a")
    assert '<p class="reason">It was given</p>' in plain
    assert ">org/name</span>" in plain


@pytest.mark.parametrize(
    ("rise", "error", "said"),
    [(0.021, 0.01, True), (0.019, 0.01, False), (-0.5, 0.01, False), (0.5, None, False), (None, None, False)],
)
def test_overfitting_is_said_beyond_two_errors(rise: float | None, error: float | None, said: bool) -> None:
    found = result(decision=GOLDEN["decision"] | {"rise": rise, "rise_se": error})
    assert any("risen by 0.0210 ± 0.0100 nats" in warning for warning in warnings(found)) == said
