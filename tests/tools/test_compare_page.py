"""The page of `compare --html`, clicked through in headless Chromium without a network."""

import re
import shutil

import numpy as np
import pytest
from test_compare import linear, make_run

from common.evaluation import Camera
from common.tools.compare import compare

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.timeout(900)  # starting a browser on a busy machine takes minutes
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
NAME = "</script><script>hack()</script>"
PARENT = "import torch\n\nwidth = 64\nprint('<b>bold</b>')\n"


def film(path, grey):
    camera = Camera(path)
    for i in range(30):
        camera.take(np.full((48, 64, 3), grey + i, np.uint8))
    camera.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a script and its fork, each with an argument of its own, on two tasks; a name tries to break out."""
    tmp_path = tmp_path_factory.mktemp("page")
    for script, slope, own in (("dqn", 1.0, {"double": True}), ("fork", 1.2, {"beta": 7})):
        for env_id in ("CartPole-v1", "Acrobot-v1"):
            for seed in (1, 2, 3):
                evals = [(1000, 50 * slope + 10 * seed)]
                path = make_run(
                    tmp_path / "runs", f"{env_id}__{script}__{seed}", script=script, env_id=env_id, seed=seed,
                    episodes=linear(slope + seed / 10), evals=evals, learning_rate=0.1 * slope, note=script + EVIL,
                    **own,
                )  # fmt: skip
                (path / "source").mkdir()
                if script == "fork":
                    (path / "source" / "parent.diff").write_text("--- algos/dqn.py\n+++ fork.py\n-a <b>\n+c\n+d\n")
                code = PARENT if script == "dqn" else PARENT.replace("64", "128") + "# more\n"
                (path / "source" / f"{script}.py").write_text(code)
                if env_id == "CartPole-v1":
                    film(path / "videos" / "step-000000500.mp4", 10)
                    film(path / "videos" / "step-000001000.mp4", 50 * seed)
                    (path / "videos" / "step-000001000.part.mp4").touch()
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "page.html"
    runs = tmp_path / "runs"
    compare.main(
        [
            "dqn.py",
            f"{NAME}={runs}/CartPole-v1__fork__1",
            "fork.py",
            "--runs-dir",
            str(runs),
            "--html",
            str(target),
        ]
    )
    return target


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs the browser Chromium (Debian's package chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def windows(browser, page):
    """Opens the page once in a window of each kind, and gathers what it logs and what else it asks for."""
    tabs, trouble = {}, []

    def window(width, height, **more):
        if (width, height) not in tabs:
            for tab in tabs.values():  # its films play on
                tab.context.close()
            tabs.clear()
            context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **more)
            tabs[width, height] = tab = context.new_page()
            tab.set_default_timeout(240_000)
            tab.on("pageerror", lambda error: trouble.append(str(error)))
            tab.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
            kept = ("data:", "blob:", page.as_uri())
            tab.on("request", lambda request: trouble.append(request.url) if not request.url.startswith(kept) else None)
            tab.goto(page.as_uri())
            tab.wait_for_selector("#chart1 .scatterlayer .trace")
            tab.set_default_timeout(20_000)  # the page is there: what it lacks now does not come
        return tabs[width, height]

    return window, trouble


@pytest.fixture
def opened(windows):
    window, trouble = windows
    yield window
    assert trouble == []


def drawn(tab, chart):
    """The visible lines of a chart, by name: what Plotly was given."""
    lines = tab.evaluate(f"document.getElementById('chart{chart}').data.map(t => [t.name, t.x, t.y])")
    return {name: (x, y) for name, x, y in lines if name}


def test_curves_can_be_hovered_smoothed_switched_and_hidden(opened):
    tab = opened(1200, 900)
    labels = [label.strip() for label in tab.locator("#groups label").all_inner_texts()]
    assert labels == ["dqn", NAME, "fork"]
    cartpole = next(i for i in (0, 1) if tab.evaluate(f"data.tasks[{i}].env_id") == "CartPole-v1")
    steps, curve = drawn(tab, cartpole)["dqn"]
    assert steps[-1] == 1000
    # The last 50 of 1,000 steps hold the ends of episodes 48, 49 and 50, whose returns are (1.1, 1.2, 1.3) times that.
    assert curve[-1] == pytest.approx(1.2 * 49)

    area = tab.locator(f"#chart{cartpole} .nsewdrag").bounding_box()
    tab.mouse.move(area["x"] + area["width"] * 0.5, area["y"] + area["height"] * 0.5)
    tab.wait_for_selector(f"#chart{cartpole} .hoverlayer .legend text")
    assert "dqn" in tab.locator(f"#chart{cartpole} .hoverlayer").inner_html()

    tab.locator("#smoothing").fill("5")
    assert drawn(tab, cartpole)["dqn"][1][-1] == pytest.approx(sum(curve[-5:]) / 5)
    assert tab.locator("#smoothed").inner_text() == "5 points"
    tab.locator("#smoothing").fill("1")
    assert drawn(tab, cartpole)["dqn"][1] == curve

    tab.locator("#x").select_option("seconds")
    assert drawn(tab, cartpole)["dqn"][0][-1] == 10
    assert tab.locator(f"#chart{cartpole} .xtitle").text_content() == "seconds"

    tab.locator("#each").check()
    assert len([name for name in drawn(tab, cartpole) if name.startswith("CartPole-v1__dqn__")]) == 3
    tab.locator("#each").uncheck()
    tab.locator("#groups input").first.uncheck()
    assert "dqn" not in drawn(tab, 0) and "fork" in drawn(tab, 0)
    tab.locator("#groups input").first.check()
    assert "dqn" in drawn(tab, 0)


def test_tables_code_and_runs_can_be_read(opened):
    tab = opened(1200, 900)
    assert tab.evaluate("window.hacked") is None
    assert tab.get_by_text("forked from").count() == 0  # its parent is the first group
    tab.get_by_text("fork against dqn").click()
    diff = tab.locator("details[open] .diff")
    assert diff.locator(".add").all_inner_texts() == ["+++ fork.py", "+width = 128", "+# more"]
    assert diff.locator(".del").all_inner_texts() == ["--- dqn.py", "-width = 64"]
    assert "print('<b>bold</b>')" in diff.inner_text()
    tab.get_by_text("all 12 runs").click()
    assert tab.get_by_text("Acrobot-v1__fork__2").is_visible()


def test_arguments_of_some_groups_are_folded(opened):
    tab = opened(1200, 900)

    def rows(table):
        return [[cell.strip() for cell in row.split("\t")] for row in table.locator("tr").all_inner_texts()[1:]]

    shared, own = tab.locator(".differs table").all()
    assert ["learning_rate", "0.1", "0.12", "0.12"] in rows(shared) and not own.is_visible()
    tab.get_by_text("arguments that only some groups have: 2").click()
    own.wait_for(state="visible")
    assert rows(own) == [["double", "True", "-", "-"], ["beta", "-", "7", "7"]]
    assert not [row for row in rows(shared) if row[0] in ("double", "beta")]


def test_the_controls_stay_with_the_charts_and_cover_no_table(opened):
    tab = opened(1200, 900)
    where = "id => { const box = document.querySelector(id).getBoundingClientRect(); return [box.top, box.bottom]; }"
    tab.evaluate("document.querySelector('#charts').scrollIntoView()")
    assert tab.evaluate(where, "#controls")[0] == pytest.approx(0, abs=1)
    for table in tab.locator("table:visible").all():
        top = table.evaluate("table => { table.scrollIntoView(); return table.getBoundingClientRect().top; }")
        assert tab.evaluate(where, "#controls")[1] <= top
    tab.evaluate("scrollTo(0, 0)")


def test_the_film_is_the_last_of_the_median_run_and_plays(opened):
    tab = opened(1200, 900)
    captions = tab.locator("figcaption").all_inner_texts()
    assert len(captions) == 3  # of Acrobot there is none
    assert captions[0].startswith("dqn: seed 2 at step 1,000")
    tab.get_by_text("play all").click()
    tab.wait_for_function(
        "[...document.querySelectorAll('video')].every(v => v.videoWidth === 64 && v.currentTime > 0)", timeout=120_000
    )


def test_it_fits_a_phone(opened, tmp_path):
    tab = opened(390, 844, is_mobile=True, has_touch=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.locator("#chart0").bounding_box()["width"] <= 390
    tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for table in tab.locator("table").all():  # the names, which stay where they are, leave room for the numbers
        assert table.locator("th").first.bounding_box()["width"] <= 390 * 0.41
    tab.locator("#groups input").first.tap()
    assert "dqn" not in drawn(tab, 0)
    tab.screenshot(path=tmp_path / "phone.png", full_page=True)


def test_videos_beyond_the_limit_are_linked(page, tmp_path, monkeypatch):
    text = page.read_text()
    assert text.count("data:video/mp4") == 3
    runs = page.parent.parent / "runs"
    (tmp_path / "deep").mkdir()
    one = (runs / "CartPole-v1__dqn__2" / "videos" / "step-000001000.mp4").stat().st_size
    target = tmp_path / "deep" / "page.html"
    words = ["dqn.py", "fork.py", "--runs-dir", str(runs), "--html", str(target)]
    monkeypatch.setattr(compare.page, "EMBEDDED", one * 1.5)
    compare.main(words)
    text = target.read_text()
    assert text.count("data:video/mp4") == 1
    (linked,) = [source for source in re.findall(r'<video[^>]* src="([^"]+)"', text) if not source.startswith("data:")]
    assert (target.parent / linked).resolve() == (runs / "CartPole-v1__fork__2/videos/step-000001000.mp4").resolve()
    assert "linked" in text


def test_a_fork_alone_has_its_difference_to_its_parent(page, tmp_path):
    target = tmp_path / "page.html"
    compare.main(["fork.py", "--runs-dir", str(page.parent.parent / "runs"), "--html", str(target)])
    text = target.read_text()
    assert "fork against the script it was forked from: +2 -1 lines" in text
    assert '<span class="del">-a &lt;b&gt;</span>' in text
