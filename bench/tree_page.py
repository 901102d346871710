"""The picture of the live page in the README: SmolLM2 serves agents, and Chromium looks at `/tree`.

    python -m bench.tree_page [--seconds N] [--out docs/tree_page.png] [--all]

Agents ask about one document, others work under two more system prompts; each goes on with its conversation, now and
then in several samples. After so many seconds the page is photographed; with --all in four more ways, beside --out.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path

from fastapi import FastAPI
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys

from bench.browser import chromium, look_like, serving
from radixgen import AsyncEngine, Engine, SamplingParams, demo
from radixgen.serve.live.routes import tree_routes

KV_TOKENS = 24_576
TOOLS = """You are an agent with tools. Think step by step, then call exactly one tool.
Tools: search(query), open(url), calculate(expression), calendar(day), mail(to, subject, body).
Answer with a line that begins with CALL, or with DONE when the task is finished."""
REVIEW = """You review pull requests. Be brief and kind. Say first what is good, then what could break, then what
is missing a test."""
TASKS = (
    "Find out when the next ferry to Marren leaves.",
    "Book a table for four on Friday evening.",
    "What is 17 percent of 3,480?",
    "Write to Ana that the meeting moved to Tuesday.",
    "Which of our invoices are older than thirty days?",
    "Plan a day on the island for a class of twenty.",
)
CHANGES = (
    "def mean(xs): return sum(xs) / len(xs)",
    "for i in range(len(items)): print(items[i])",
    "except Exception: pass",
    "cache = {}; cache[id(node)] = node",
)
MORE = ("Why?", "Say that in one sentence.", "And what follows from it?", "Are you sure? Check it once more.")
WIDE, PHONE = (1440, 900), (390, 844)


Message = dict[str, str]


async def agent(engine: AsyncEngine, tokens_of: Callable[[list[Message]], list[int]], serial: int) -> None:
    """One agent after another in this place: each a conversation of a few turns."""
    draw = random.Random(serial)
    document = (Path(demo.__file__).parent / "document.md").read_text(encoding="utf-8")
    systems = [(document, demo.QUESTIONS), (document, demo.QUESTIONS), (TOOLS, TASKS), (REVIEW, CHANGES)]
    while True:
        system, asked = systems[draw.randrange(len(systems)) if serial % 3 else 0]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": draw.choice(asked)}]
        for _ in range(draw.randint(1, 4)):
            params = SamplingParams(
                n=draw.choice((1, 1, 2, 4)), temperature=0.8, max_tokens=draw.randint(24, 72), seed=draw.randrange(9)
            )
            text = ""
            async with aclosing(engine.generate(tokens_of(messages), params)) as outputs:
                async for delta in outputs:
                    text += "".join(one.text for one in delta.outputs if one.index == 0)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": draw.choice(MORE)}]
            await asyncio.sleep(draw.uniform(0.2, 3.0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--agents", type=int, default=14)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("docs/tree_page.png"))
    parser.add_argument("--all", action="store_true", help="also light, on a phone, with a search, replayed")
    options = parser.parse_args(arguments)
    inner = Engine(options.model, kv_tokens=KV_TOKENS, max_step_tokens=512)
    engine = AsyncEngine(inner)
    app = FastAPI()
    app.include_router(tree_routes(engine))

    async def load() -> None:
        try:
            await asyncio.gather(*(agent(engine, inner.chat_tokens, serial) for serial in range(options.agents)))
        finally:
            await engine.close()

    with serving(app, load) as address, chromium() as driver:
        look_like(driver, *WIDE, dark=True)
        driver.get(f"{address}/tree")
        time.sleep(options.seconds)
        driver.execute_script("document.getElementById('tree').focus({preventScroll: true, focusVisible: false})")
        press(driver, "Home")
        press(driver, "ArrowRight")
        time.sleep(2.0)
        driver.save_screenshot(str(options.out))
        if options.all:
            others(driver, options.out)
        for line in driver.get_log("browser"):
            print(line["level"], line["message"])
    return 0


def others(driver: webdriver.Chrome, out: Path) -> None:
    """Light; a tip; a search; on a phone; replayed."""

    def shoot(name: str) -> None:
        time.sleep(1.0)
        driver.save_screenshot(str(out.with_stem(f"{out.stem}_{name}")))

    look_like(driver, *WIDE, dark=False)
    field = driver.find_element("id", "tree")
    ActionChains(driver).move_to_element_with_offset(field, 40, -40).perform()
    shoot("light")
    look_like(driver, *WIDE, dark=True)
    driver.find_element("id", "search").send_keys("tower")
    shoot("search")
    driver.find_element("id", "search").clear()
    driver.find_element("id", "search").send_keys(" ", Keys.BACKSPACE)
    look_like(driver, *PHONE, dark=True, phone=True)
    shoot("phone")
    driver.execute_script("document.getElementById('detail').scrollIntoView()")
    shoot("phone_below")
    look_like(driver, *PHONE, dark=False, phone=True)
    driver.execute_script("window.scrollTo(0, 0)")
    shoot("phone_light")
    look_like(driver, *WIDE, dark=True)
    slide = "const t = document.getElementById('time'); t.value = -20; t.dispatchEvent(new Event('input'))"
    driver.execute_script(slide)
    shoot("replay")


def press(driver: webdriver.Chrome, key: str) -> None:
    script = "document.getElementById('tree').dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))"
    driver.execute_script(script, key)


if __name__ == "__main__":
    sys.exit(main())
