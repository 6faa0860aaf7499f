"""What notebooks show: numbers with units, nothing a browser takes for markup, where and when."""

import re
from datetime import datetime, timezone

import IPython.display
import pandas as pd
import pytest

from convlab import machine, notebook


@pytest.fixture
def shown(monkeypatch):
    """Everything displayed, in order."""
    found = []
    monkeypatch.setattr(IPython.display, "display", found.append)
    return found


@pytest.mark.parametrize(
    ("text", "value", "sentence"),
    [
        ("{v:time}", 1.5, "1.5 s"),
        ("{v:time}", 0.0123, "12.3 ms"),
        ("{v:time}", 4.56e-6, "4.56 µs"),
        ("{v:time}", 7e-9, "7 ns"),
        ("{v:bytes}", 36_000_000, "36 MB"),
        ("{v:bytes}", 12, "12 B"),
        ("{v:.0%} of {v:.2f}", 0.25, "25% of 0.25"),
        ("{v}", "unfold", "unfold"),
        ("{v:time}", None, "–"),
        ("{v:bytes}", float("nan"), "–"),
        ("{v:.3f}", None, "–"),
    ],
)
def test_say_formats_a_value(shown, text, value, sentence):
    notebook.say(f"It is {text}.", v=value)
    assert shown[0].data == f"It is {sentence}."


def test_say_refuses_a_value_that_was_not_given(shown):
    with pytest.raises(KeyError, match="missing"):
        notebook.say("{missing:time}", given=1)


def test_answer_is_folded_and_escaped(shown):
    notebook.answer("{t:time} if a < b & {name}", summary="1 < 2?", t=1e-3, name="<script>")
    html = shown[0].data
    assert html.startswith("<details><summary><b>1 &lt; 2?</b></summary>")
    assert "1 ms if a &lt; b &amp; &lt;script&gt;</details>" in html


def cells(html):
    return re.findall(r"<td[^>]*>(.*?)</td>", html, re.DOTALL)


def test_table_formats_columns_and_leaves_the_frame_alone(shown):
    frame = pd.DataFrame({"t": [2e-3, None], "peak": [1e6, float("nan")], "share": [0.5, 0.25]})
    before = frame.copy()
    notebook.table(frame, t="time", peak="bytes", share=".0%")
    assert cells(shown[0].data) == ["2 ms", "1 MB", "50%", "–", "–", "25%"]
    pd.testing.assert_frame_equal(frame, before)


def test_table_shows_missing_integers(shown):
    notebook.table(pd.DataFrame({"peak": pd.array([1000, None], dtype="Int64")}), peak="bytes")
    assert cells(shown[0].data) == ["1 kB", "–"]


def test_table_escapes_and_cuts_nothing(shown):
    texts = ["<b>bold</b> & co", "word " * 100, *map(str, range(200))]
    notebook.table(pd.DataFrame({"text": texts}, index=range(202)), note="<i>note</i>")
    html = shown[0].data
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;i&gt;note&lt;/i&gt;" in html
    found = cells(html)
    assert found[0] == "&lt;b&gt;bold&lt;/b&gt; &amp; co"
    assert [text.strip() for text in found[1:]] == [text.strip() for text in texts[1:]]


def test_a_line_end_in_a_table_is_a_line_end_in_the_browser(shown):
    frame = pd.DataFrame([["51%\n56%", 1], [r"C:\new", 2.5]], ["a\nb", "c"], ["x", "n"], object)
    notebook.table(frame)
    html = shown[0].data
    assert cells(html) == ["51%<br>56%", "1", r"C:\new", "2.5"]
    assert "<th>a<br>b</th>" in html


def test_a_table_takes_equal_names_and_no_rows(shown):
    frame = pd.DataFrame([["x\ny", "z"]], columns=["a", "a"])
    notebook.table(frame)
    notebook.table(frame[:0])
    assert cells(shown[0].data) == ["x<br>y", "z"]
    assert cells(shown[1].data) == []


def test_the_foot_of_a_table_is_the_caption(shown):
    notebook.table(pd.DataFrame({"a": [1]}))
    assert f"<small>{notebook.caption()}</small>" in shown[0].data


@pytest.mark.parametrize(("threads", "text"), [(1, "1 thread,"), (2, "2 threads,")])
def test_caption_names_machine_threads_allocator_versions_and_date(threads, text):
    days = [datetime.now(timezone.utc)]
    with machine.setting(threads=threads):
        caption = notebook.caption()
    assert caption.startswith(machine.name())
    assert text in caption
    assert machine.allocator() in caption
    assert machine.versions()["torch"] in caption
    days.append(datetime.now(timezone.utc))
    assert caption.split(", ")[-1] in [day.strftime("%Y-%m-%d") for day in days]
