"""The review's page in a real headless Chromium: a whole review with the keyboard, the mouse, and hostile texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Page, browsing
from reviews import HOSTILE, begin, click, item, serving
from tunegate.files import read_jsonl
from tunegate.report.review import Review


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests of this file; skips them where there is none."""
    with browsing(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(autouse=True)
def clean(page: Page) -> Iterator[None]:
    page.requests.clear()
    page.errors.clear()
    yield
    page.call("Page.navigate", url="about:blank")


def saved(page: Page) -> None:
    page.wait("document.querySelector('#saved').textContent === 'Saved'")


def verdicts(review: Review, reviewer: str = "anna") -> list[tuple[object, object, object]]:
    return [(s["left"], s["right"], s["preferred"]) for s in review.seen(reviewer, review.log())]


def test_a_review_from_the_first_key_to_the_labels(page: Page, tmp_path: Path) -> None:
    review = begin(tmp_path / "run", [item("0"), item("1"), item("2", "same", "same")])
    with serving(review) as (server, _):
        page.open(server.url("anna"))
        assert page.js("document.querySelector('#count').textContent") == "0 of 3 judged"
        page.keys("1", "3", "Enter")  # A good, B bad: A is better
        page.keys("2", "2")
        assert page.js("document.querySelector('#preferred').classList.contains('asked')")
        page.keys("3")  # both partly, B better
        page.keys("n")
        page.type("a note")
        page.keys("Enter", "Enter")  # leaves the note; next
        page.keys("1", "Enter")  # one text, one verdict
        saved(page)
        assert verdicts(review) == [("good", "bad", "left"), ("partly", "partly", "right"), ("good", "good", "tie")]
        assert not review.log().finished and page.js("!document.querySelector('.panel')")
        page.keys("Enter")
        page.wait("!!document.querySelector('.panel')")
        assert page.js("document.querySelector('#end h2').textContent") == "The review is finished"
        assert page.js("document.querySelectorAll('tbody tr').length") == 3
    assert review.log().finished == ["anna"]
    labels = read_jsonl(review.folder / "labels.jsonl")
    assert [label["note"] for label in labels] == ["", "a note", ""]
    left = review.sides("anna")[0][0]
    assert labels[0]["preferred"] == left and labels[0][left] == "good"
    host = f"http://127.0.0.1:{server.server_port}/{server.token}/"
    assert all(url.startswith(host) for url in page.requests) and not page.errors


def test_with_the_mouse_back_forward_and_again(page: Page, tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 3)
    with serving(review) as (server, _):
        page.open(server.url("anna"))
        page.click("#left button.good")
        page.click("#right button.good")
        page.click("#preferred button[value=tie]")
        page.keys("Enter")  # after a click with the mouse, Enter is still "next"
        page.click("#right button.bad")  # in any order
        page.keys("3", "1")
        page.click("#back")
        assert page.js("document.querySelector('#left [aria-pressed=true]').value") == "good"
        page.keys("Backspace", "2", "3")
        page.click("#progress button:last-child")
        page.keys("Enter")
        assert page.js("document.querySelector('#end h2').textContent") == "1 of 3 items are still open"
        saved(page)
    assert verdicts(review) == [("partly", "bad", "left"), ("bad", "bad", "left"), (None, None, None)]
    with serving(review) as (server, _):  # another day: it goes on at the first open item
        page.open(server.url("anna"))
        assert page.js("document.querySelector('[aria-current]').title") == "Item 3"
        page.key("ArrowLeft")
        assert page.js("document.querySelector('#left [aria-pressed=true]').value") == "bad"
        page.open(server.url("ben"))
        assert page.js("document.querySelector('#count').textContent") == "0 of 3 judged"


def test_hostile_texts_are_text(page: Page, tmp_path: Path) -> None:
    prompt = [
        {"role": role, "content": text} for role, text in zip(("system", "user", "<b>odd</b>"), HOSTILE, strict=False)
    ]
    items = [item(str(n), text, "x", reference=text, prompt=prompt) for n, text in enumerate(HOSTILE)]
    review = begin(tmp_path / "run", items)
    with serving(review) as (server, _):
        page.open(server.url("</title><script>document.title='owned'</script>"))
        for place, text in enumerate(HOSTILE):
            shown = page.js("['left', 'right'].map((side) => document.querySelector(`#${side}-text`).textContent)")
            assert sorted(shown) == sorted([text, "x"])
            page.keys("1", "3", "n")
            page.type(text)
            page.keys("Escape", "Enter")
            assert page.js("document.querySelectorAll('main img, main script, #owned').length") == 0, place
        page.keys("Enter")
        page.wait("!!document.querySelector('.panel')")
        notes = page.js("[...document.querySelectorAll('td.note')].map((cell) => cell.textContent)")
        assert notes == [json.loads(json.dumps(text)) for text in HOSTILE]
        assert page.js("document.querySelectorAll('main img, main script, #owned').length") == 0
        assert page.js("document.title") == "Review: intents"
    assert not page.errors


@pytest.mark.parametrize("width", [380, 1280])
def test_long_and_right_to_left_texts_stay_in_their_place(page: Page, tmp_path: Path, width: int) -> None:
    long = "\n\n".join(["word " * 200, "w" * 5000, "\u05e9\u05dc\u05d5\u05dd " * 200])
    prompt = [
        {"role": "system", "content": long},
        {"role": "user", "content": "\u0645\u0631\u062d\u0628\u0627 (abc) 1"},
    ]
    review = begin(tmp_path / "run", [item("0", long, "\u0645\u0631\u062d\u0628\u0627 1", prompt=prompt)])
    with serving(review) as (server, _):
        page.resize(width, 860)
        page.open(server.url("anna"))
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        dock = page.js("document.querySelector('#dock').getBoundingClientRect().bottom")
        assert dock <= 860.5  # the questions are in reach, however long the answers
        assert page.js("getComputedStyle(document.querySelector('.turn.user .text')).direction") == "rtl"
        before = page.js("document.querySelector('.turn.system .text').clientHeight")
        page.keys("e")
        assert page.js("document.querySelector('.turn.system .text').clientHeight") > before
        page.resize(1280, 860)


def test_a_click_that_could_not_be_saved_is_sent_again(page: Page, tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 2)
    with serving(review) as (server, _):
        page.open(server.url("anna"))
        page.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        page.keys("1", "3")
        page.wait("document.querySelector('#saved').textContent.startsWith('Not saved')")
        assert verdicts(review)[0] == (None, None, None)
        page.call(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        saved(page)
    assert verdicts(review)[0] == ("good", "bad", "left")


def test_a_page_of_someone_who_finished_elsewhere_says_so(page: Page, tmp_path: Path) -> None:
    review = begin(tmp_path / "run", 1)
    with serving(review) as (server, client):
        page.open(server.url("anna"))
        assert client.click("anna", 0, click("good", "bad")) == 200 and client.finish("anna")[0] == 200
        page.keys("3")
        page.wait("!!document.querySelector('.panel')")
        page.key("ArrowLeft")
        assert page.js("document.querySelector('#left-name .chip').textContent") == review.sides("anna")[0][0]
        assert page.js("[...document.querySelectorAll('.question button')].every((button) => button.disabled)")


def test_a_wrong_link_says_what_to_do(page: Page, tmp_path: Path) -> None:
    with serving(begin(tmp_path / "run")) as (server, _):
        page.open(f"http://127.0.0.1:{server.server_port}/{server.token}/?reviewer=")
        assert "not a name of a reviewer" in page.js("document.querySelector('.message').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(page: Page, tmp_path: Path, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 between text and what is behind it, for texts, labels, chips and pressed buttons."""
    review = begin(tmp_path / "run", [item("0"), item("1")])
    with serving(review) as (server, _):
        page.scheme(scheme)
        page.open(server.url("anna"))
        page.keys("1", "3")
        page.wait("document.getAnimations().length === 0")
        selectors = ".text, .turn > span, .count, .label, .letter, .question button:not(:disabled), #next"
        found = page.js(CONTRAST % json.dumps(selectors))
        page.keys("Enter", "2", "1", "Enter", "Enter")
        page.wait("!!document.querySelector('.panel')")
        found += page.js(
            CONTRAST % json.dumps(".chip, .figure, .figure small, .legend span, .end > p, th, td button, code")
        )
        page.scheme("light")
    assert len(found) > 25
    assert all(ratio >= 4.5 for _, ratio in found), [pair for pair in found if pair[1] < 4.5]


CONTRAST = """
[...document.querySelectorAll(%s)].filter((e) => e.offsetWidth && e.textContent).map((element) => {
  const rgba = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return [...c.slice(0, 3), c[3] ?? 1]; };
  const over = (a, b) => a.slice(0, 3).map((x, i) => x * a[3] + b[i] * (1 - a[3]));
  const chain = [];
  for (let e = element; e; e = e.parentElement) chain.unshift(rgba(getComputedStyle(e).backgroundColor));
  const behind = chain.reduce((back, c) => over(c, back), [255, 255, 255]);
  const light = (c) => c.map((x) => (x / 255 <= .03928 ? x / 255 / 12.92 : ((x / 255 + .055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const [a, b] = [light(over(rgba(getComputedStyle(element).color), behind)), light(behind)].sort((x, y) => y - x);
  return [element.className + " " + element.textContent.slice(0, 20), (a + .05) / (b + .05)];
})
"""
