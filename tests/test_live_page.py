"""The live page in a real Chromium: what it shows is what the engine holds, and nothing in a prompt runs."""

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote
from urllib.request import urlopen

import httpx
import numpy as np
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException
from oracle import StampModel
from scripted_model import tokenizer
from selenium.webdriver import ActionChains
from served import over_socket, tiny

from bench.browser import WANTED, chromium, installed, look_like, serving
from bench.null import NullModel
from radixgen import AsyncEngine, Engine, Limits, SamplingParams
from radixgen.serve.live.feed import Feed
from radixgen.serve.live.routes import tree_routes

WANTS_BROWSER = "RADIXGEN_TEST_BROWSER" in os.environ
"""As in CI, where these tests fail without one"""
pytestmark = pytest.mark.skipif(not installed() and not WANTS_BROWSER, reason=WANTED)

EVIL = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
PAGE = "document.getElementById('{}').textContent"


class Paced(NullModel):
    """Takes its time, as a model does."""

    def run(self, *arguments: Any) -> Any:
        time.sleep(0.02)
        return super().run(*arguments)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        driver.set_window_size(1200, 800)
        yield driver


@contextmanager
def page(
    driver: Any,
    *,
    guard: Any = None,
    limits: Limits | None = None,
    fill: Callable[[Engine], None] | None = None,
    model: Any = None,
    **options: Any,
):
    """The page of an engine whose tokens are bytes; `GET /ask` serves a prompt on it. Gives `ask` and the engine."""
    options = {"kv_tokens": 1 << 17} | options
    inner = Engine(model or Paced(256), tokenizer=tokenizer(), limits=limits, **options)
    if fill is not None:
        fill(inner)
    engine = AsyncEngine(inner)
    feed, app = Feed(engine, interval=0.1), FastAPI()
    app.include_router(tree_routes(engine, feed=feed, data_access=[Depends(guard)] if guard else []))

    @app.get("/ask")
    async def ask(prompt: str, n: int = 1, tokens: int = 8) -> None:
        params = SamplingParams(max_tokens=tokens, n=n, seed=1)
        async for _ in engine.generate(prompt, params):
            pass

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        found = await engine.stats()
        return {"running": found.num_running, "used": found.kv_tokens_used, "saved": found.rows_saved}

    def get(path: str, **query: Any) -> Any:
        asked = "&".join(f"{name}={quote(str(value))}" for name, value in query.items())
        with urlopen(f"{address}{path}?{asked}", timeout=20) as answer:
            return json.loads(answer.read())

    try:
        with serving(app) as address:
            driver.get(f"{address}/tree")
            yield get
            noise = [one["message"] for one in driver.get_log("browser") if one["level"] == "SEVERE"]
            assert guard is not None or not noise, noise
            driver.get("about:blank")
            feed.close()
    finally:
        asyncio.run(engine.close())


def until(driver: Any, expression: str, wanted: Any) -> None:
    """Wait for the page to say so."""
    end = time.monotonic() + 20
    while (found := driver.execute_script(f"return {expression}")) != wanted:
        assert time.monotonic() < end, f"{expression} is {found!r}, not {wanted!r}"
        time.sleep(0.05)


def says(driver: Any, element: str) -> str:
    return str(driver.execute_script(f"return {PAGE.format(element)}"))


def press(driver: Any, *keys: str) -> None:
    for key in keys:
        script = "const tree = document.getElementById('tree'); tree.focus(); tree.dispatchEvent(new KeyboardEvent("
        driver.execute_script(script + "'keydown', {key: arguments[0]}))", key)


def test_the_counts_are_the_engines(driver: Any) -> None:
    def fill(engine: Engine) -> None:
        engine.generate(["You are kind. Hello", "You are kind. Bye"], SamplingParams(max_tokens=4, seed=1))
        for rest in ("One", "Two", "Three"):
            engine.submit(f"You are kind. {rest}", SamplingParams(max_tokens=3_000, n=2, ignore_eos=True))

    with page(driver, fill=fill) as get:
        until(driver, PAGE.format("running"), "6")
        until(driver, "document.documentElement.dataset.cursors", "6")
        until(driver, f"{PAGE.format('drawn')} === {PAGE.format('nodes')}", True)
    with page(driver) as get:
        get("/ask", prompt="You are kind. Hello", n=3)
        get("/ask", prompt="You are kind. Hello again", n=3)
        stats = get("/stats")
        assert stats["running"] == 0 and stats["saved"] > 0
        until(driver, PAGE.format("rows"), f"{stats['saved']:,}")
        until(driver, PAGE.format("pool"), f"{stats['used']:,}")
        until(driver, PAGE.format("running"), "0")


def in_tiers(engine: Engine) -> None:
    """Leave a system prompt everywhere, one answer in pool and host memory, and one in host memory alone."""
    core = engine._core
    assert core.host is not None
    engine.generate(SYSTEM + "One", SamplingParams(max_tokens=4, seed=1))
    core.host.saves.complete()
    core.host.saves.complete_writes()
    core.tree.reset()
    engine.generate(SYSTEM + "Two", SamplingParams(max_tokens=4, seed=1))
    core.host.saves.complete()
    core.host.saves.complete_writes()


SYSTEM = "You are kind, and you answer in one short sentence, in plain words, always. "


def test_the_outline_says_where_kv_is(driver: Any, tmp_path: Path) -> None:
    tiers = {"kv_tokens": 400, "host_kv_tokens": 4_000, "kv_dir": tmp_path / "kv"}
    with page(driver, model=StampModel(256, 4_096), fill=in_tiers, **tiers):
        until(driver, f"Number({PAGE.format('drawn')})", 4)
        until(driver, "document.getElementById('tiers').hidden", False)
        legend = "document.querySelectorAll('#legend [data-tier]:not([hidden])').length"
        until(driver, legend, 3)
        until(driver, PAGE.format("host-all"), "4,000")
        until(driver, PAGE.format("disk"), "64")
        outline = "getComputedStyle(document.documentElement).getPropertyValue('--tier')"
        colours = set()
        for dark in (True, False):
            look_like(driver, 1200, 800, dark=dark)
            time.sleep(0.5)
            colours.add(driver.execute_script(f"return {outline}"))
            if folder := os.environ.get("RADIXGEN_TEST_PICTURES"):
                driver.save_screenshot(f"{folder}/tiers_{'dark' if dark else 'light'}.png")
        assert len(colours) == 2
        press(driver, "Home")
        until(driver, f"{PAGE.format('facts')}.includes('In the pool{len(SYSTEM)}In host memory{len(SYSTEM)}')", True)
        until(driver, f"{PAGE.format('facts')}.includes('On disk64')", True)
        press(driver, "ArrowRight", "ArrowDown")
        until(driver, f"{PAGE.format('facts')}.includes('In the pool0In host memory6')", True)
        assert "in host memory" in says(driver, "said")
    with page(driver):
        until(driver, "document.getElementById('tiers').hidden", True)
        until(driver, legend, 0)


METRICS = {
    "running": "num_requests_running",
    "nodes": "tree_nodes",
    "rows": "saved_prompt_rows_total",
    "pool": "kv_tokens_used",
}


def test_the_counts_are_those_of_metrics(driver: Any) -> None:
    with over_socket(tiny()) as served:
        for rest in ("1", "2", "3 and a half"):
            body = {"model": "tiny", "prompt": f"Some of this is shared. {rest}", "max_tokens": 4}
            httpx.post(f"{served.url}/v1/completions", json=body).raise_for_status()
        told = httpx.get(f"{served.url}/metrics").text
        driver.get(f"{served.url}/tree")
        for place, name in METRICS.items():
            (count,) = re.findall(rf"^radixgen:{name}(?:{{.*}})? (.*)$", told, re.MULTILINE)
            until(driver, PAGE.format(place), f"{int(float(count)):,}")
        assert "saved_prompt_rows_total 0.0" not in told
        driver.get("about:blank")


def test_what_a_prompt_says_does_not_run(driver: Any) -> None:
    with page(driver) as get:
        get("/ask", prompt=EVIL)
        until(driver, f"Number({PAGE.format('drawn')}) > 1", True)
        until(driver, PAGE.format("status"), "live")
        time.sleep(0.3)
        press(driver, "Home", "Enter")
        until(driver, f"{PAGE.format('text')}.startsWith({json.dumps(EVIL)})", True)
        until(driver, f"{PAGE.format('crumbs')}.includes('<script>')", True)
        found = driver.execute_script("return [window.hacked ?? null, document.scripts.length, document.images.length]")
        assert found == [None, 1, 1]


def test_the_page_allows_nothing_from_elsewhere(driver: Any) -> None:
    with page(driver):
        until(driver, PAGE.format("status"), "live")
        address = driver.execute_script("return location.origin")
        for path in ("/tree", "/tree/static/page.js"):
            with urlopen(address + path, timeout=20) as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert loaded and all(name.startswith(address) for name in loaded)
        inline = "const s = document.createElement('style'); s.textContent = 'body { color: red }'; "
        driver.execute_script(inline + "document.head.append(s)")
        assert driver.execute_script("return getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
        driver.get_log("browser")


def test_keys_move_and_zoom(driver: Any) -> None:
    with page(driver) as get:
        for rest in ("apples", "pears", "plums"):
            get("/ask", prompt=f"I would like {rest}", tokens=1)
        until(driver, f"Number({PAGE.format('drawn')})", 6)
        time.sleep(0.5)
        press(driver, "Home")
        until(driver, PAGE.format("text"), "I would like ")
        press(driver, "ArrowRight")
        until(driver, PAGE.format("text"), "apples")
        press(driver, "ArrowDown")
        until(driver, PAGE.format("text"), "p")
        press(driver, "ArrowRight", "ArrowDown")
        until(driver, PAGE.format("text"), "lums")
        assert "4 tokens, cached: lums" in says(driver, "said")
        press(driver, "ArrowLeft", "Enter")
        until(driver, PAGE.format("crumbs"), "everythingI would like p")
        press(driver, "Escape", "Escape")
        until(driver, PAGE.format("crumbs"), "")
        driver.find_element("css selector", "#path button").click()
        until(driver, PAGE.format("said"), "0 tokens, cached: ")


def test_pointing_tells_and_a_click_selects(driver: Any) -> None:
    with page(driver) as get:
        get("/ask", prompt="I would like apples", tokens=1)
        until(driver, f"Number({PAGE.format('drawn')})", 2)
        until(driver, PAGE.format("status"), "live")
        time.sleep(0.7)
        tree = driver.find_element("id", "tree")
        ActionChains(driver).move_to_element(tree).perform()
        until(driver, "document.getElementById('tip').hidden", False)
        tip = says(driver, "tip")
        assert tip.startswith("cached19 tokens; 0 nodes below; known for") and tip.endswith("I would like apples"), tip
        ActionChains(driver).click(tree).perform()
        until(driver, PAGE.format("text"), "I would like apples")
        assert "Positions0 to 19" in says(driver, "facts")


def test_a_search_finds_across_nodes(driver: Any) -> None:
    with page(driver) as get:
        for rest in ("apples", "pears"):
            get("/ask", prompt=f"I would like {rest}", tokens=1)
        until(driver, f"Number({PAGE.format('drawn')})", 4)
        search = driver.find_element("id", "search")
        for text, nodes in (("LIKE PEA", "1 node"), ("like", "1 node"), ("p", "2 nodes"), ("grapes", "0 nodes")):
            search.clear()
            search.send_keys(text)
            until(driver, PAGE.format("found"), nodes)
        search.clear()
        search.send_keys("like apples")
        until(driver, PAGE.format("found"), "1 node")
        search.submit()
        until(driver, PAGE.format("text"), "apples")


def test_a_replay_shows_an_earlier_frame(driver: Any) -> None:
    with page(driver) as get:
        get("/ask", prompt="before", tokens=1)
        until(driver, PAGE.format("drawn"), "2")
        driver.execute_script("document.getElementById('play').click()")
        until(driver, PAGE.format("status"), "replay")
        get("/ask", prompt="after", tokens=1)
        get("/ask", prompt="later", tokens=1)
        time.sleep(0.5)
        assert says(driver, "drawn") == "2"
        driver.execute_script("document.getElementById('play').click()")
        time.sleep(0.2)
        driver.execute_script("document.getElementById('now').click()")
        until(driver, PAGE.format("drawn"), "4")
        slide = "const time = document.getElementById('time'); time.value = -30; time.dispatchEvent(new Event('input'))"
        driver.execute_script(slide)
        until(driver, f"Number({PAGE.format('drawn')}) <= 2", True)
        assert says(driver, "when").startswith("−")
        driver.execute_script("document.getElementById('now').click()")
        until(driver, f"[{PAGE.format('drawn')}, {PAGE.format('when')}]", ["4", "now"])


def test_two_thousand_nodes_and_more(driver: Any) -> None:
    """The page keeps up with what comes; how fast it draws is told by `bench.live`."""

    def fill(engine: Engine) -> None:
        rng = np.random.default_rng(0)
        prompts = [[*b"You are kind. ", *rng.integers(0, 256, 8).tolist()] for _ in range(2_400)]
        engine.generate(prompts, SamplingParams(max_tokens=1))
        for prompt in prompts[:100]:
            engine.submit(prompt, SamplingParams(max_tokens=3_000, ignore_eos=True))

    with page(driver, fill=fill):
        until(driver, PAGE.format("drawn"), "2,000")
        until(driver, PAGE.format("running"), "100")
        until(driver, "document.documentElement.dataset.cursors", "100")
        assert "nodes are not drawn" in says(driver, "folded")
        until(driver, f"Number({PAGE.format('fps')}) > 0 && Number({PAGE.format('updates')}) > 0", True)


def test_a_server_that_wants_a_key(driver: Any) -> None:
    def guard(authorization: Annotated[str, Header()] = "") -> None:
        if authorization != "Bearer secret":
            raise HTTPException(401)

    with page(driver, guard=guard) as get:
        until(driver, "document.getElementById('door').hidden", False)
        get("/ask", prompt="hello")
        for key in ("wrong", "secret"):
            driver.find_element("id", "key").send_keys(key)
            driver.find_element("css selector", "#door button").click()
        until(driver, PAGE.format("status"), "live")
        until(driver, "document.getElementById('door').hidden", True)
        driver.execute_script("sessionStorage.clear()")
        driver.get_log("browser")
