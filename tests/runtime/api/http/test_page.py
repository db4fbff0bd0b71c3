"""The live page in a real browser, over a real port."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from agents.tool_protocol import ToolCall, ToolUse
from runtime.api.auth import Scope, Tokens
from runtime.engines.usage import Usage
from runtime.jobs.submission import Submission
from runtime.jobs.tool_record import ToolRecord
from tests.programs import CHROMIUM, needs
from tests.runtime.api.http.conftest import PROBLEM, Start, configured, pause_solver, service

expect.set_options(timeout=60_000)  # milliseconds; the default of 5 s is short on a busy machine
pytestmark = needs(CHROMIUM, "Chromium")


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


async def open_page(browser: Browser, url: str, **options: object) -> tuple[Page, list[str]]:
    """Open the page; return it, and the list that collects the errors on its console."""
    context = await browser.new_context(**options)  # type: ignore[arg-type]
    page = await context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    await page.goto(url)
    return page, complaints


async def test_submitted_problem_appears_with_its_steps(start: Start, browser: Browser, tmp_path: Path) -> None:
    served = await start(time_scale=1)
    for _ in range(60):  # enough load to make the controller move memory
        await served.backend.jobs.submit(Submission(problem=PROBLEM))
    for scheme, size in (("light", (1280, 900)), ("dark", (390, 844))):
        page, complaints = await open_page(
            browser, served.url, color_scheme=scheme, viewport={"width": size[0], "height": size[1]}
        )
        await expect(page.locator("#state")).to_contain_text("policy turns")
        await expect(page.locator("#engines tr")).to_have_count(3)
        # Use the keyboard only.
        await page.keyboard.press("Tab")
        await page.keyboard.type(PROBLEM)
        await page.keyboard.press("Enter")
        await expect(page.locator("#submitted")).to_contain_text("accepted as")
        job = page.locator("#jobs > li").first
        await expect(job).to_contain_text(f"{PROBLEM} → 17")
        await expect(job).to_contain_text("9 steps")
        await job.locator("summary").focus()
        await page.keyboard.press("Enter")
        await expect(job).to_contain_text("solver: 12+7 → 19")
        await expect(page.locator("#decisions > li").first).to_contain_text("turns")
        assert await page.locator("#shares canvas").count() == 1
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0]  # no horizontal scrolling on a phone
        await page.wait_for_timeout(1200)
        await page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        assert complaints == []


async def test_call_of_a_tool_shows_while_it_runs_and_then_its_output(start: Start, browser: Browser) -> None:
    served = await start()
    page, complaints = await open_page(browser, served.url)
    await expect(page.locator("#state")).to_contain_text("policy turns")
    journal = served.backend.jobs.journal
    await journal.write(lambda transaction: transaction.accept("tooled", Submission(problem="2**64?")))
    call = ToolCall("python", {"code": "2**64"}, "")
    for number, use in ((1, ToolUse(call, "18446744073709551616")), (2, ToolUse(call, "no memory", failed=True))):
        record = ToolRecord(number, "coder", "", call, Usage())
        await journal.write(lambda transaction, record=record: transaction.add_tool_call("tooled", record))  # type: ignore[misc]
        job = page.locator("#jobs > li", has_text="2**64?")
        await expect(job).to_contain_text(f"queued 2**64? {number} steps")
        step = job.locator("li").nth(number - 1)
        await expect(step).to_have_text('coder: python {"code":"2**64"} → running')
        await journal.write(
            lambda transaction, use=use, number=number: transaction.add_tool_use("tooled", number, "coder", use)  # type: ignore[misc]
        )
        await expect(step).to_have_text(f'coder: python {{"code":"2**64"}} → {use.output}')
        assert (await step.get_attribute("class") == "failed") is use.failed
    assert complaints == []


async def test_button_pins_and_unpins_an_engine(start: Start, browser: Browser) -> None:
    served = await start()
    page, complaints = await open_page(browser, served.url)
    await page.get_by_role("button", name="pin solver", exact=True).click()
    await expect(page.get_by_role("button", name="unpin solver")).to_be_visible()
    assert [*served.backend.ready_team().controllers.pinned] == ["solver"]
    await page.get_by_role("button", name="unpin solver").click()
    await expect(page.get_by_role("button", name="pin solver", exact=True)).to_be_visible()
    assert not served.backend.ready_team().controllers.pinned
    assert complaints == []


async def test_engines_show_their_pause_and_the_cost_of_a_step(start: Start, browser: Browser) -> None:
    served = await start(time_scale=1)
    page, complaints = await open_page(browser, served.url)
    await pause_solver(served)
    solver = page.locator("#engines tr").nth(1)
    await expect(solver).to_contain_text(re.compile(r"paused \d+\.\d s"))
    cost = solver.get_by_title("each prompt token")
    await expect(cost).to_have_text(re.compile(r"\d+\.\d \+ \d+\.\d\d n ms"))
    await expect(cost).to_have_attribute("title", re.compile(r"µs for each prompt token. \d+% of this is measured"))
    await expect(page.locator("#engines tr").first).not_to_contain_text("paused")
    await expect(page.locator("#devices")).to_have_text(
        re.compile(r"\d\.\d engines at full speed at once \(\d+% measured\)")
    )
    await expect(page.locator("#decisions > li").first).to_contain_text(re.compile(r"solver \d+\.\d%, paused"))
    assert complaints == []


async def test_replicas_and_devices_are_shown(start: Start, browser: Browser) -> None:
    served = await start(time_scale=1, devices=2)
    page, complaints = await open_page(browser, served.url)
    await expect(page.locator("#engines tr")).to_have_count(6)
    await expect(page.locator("#engines tr").nth(4)).to_contain_text("solver@1")
    await expect(page.locator("#devices p")).to_have_count(2)
    await expect(page.locator("#devices p").nth(1)).to_contain_text("device 1: ")
    await page.get_by_role("button", name="pin solver@1", exact=True).click()
    await expect(page.get_by_role("button", name="unpin solver@1")).to_be_visible()
    assert [*served.backend.ready_team().controllers.pinned] == ["solver@1"]
    assert complaints == []


async def test_rejected_problem_shows_the_error(start: Start, browser: Browser) -> None:
    served = await start()
    page, _ = await open_page(browser, served.url)
    await page.get_by_label("Problem", exact=True).fill("1000+1")
    await page.get_by_role("button", name="Solve", exact=True).click()
    await expect(page.locator("#submitted")).to_contain_text("999")


async def test_problem_text_is_not_interpreted_as_html(start: Start, browser: Browser) -> None:
    served = await start()
    page, _ = await open_page(browser, served.url)
    await expect(page.locator("#state")).to_contain_text("ready")
    evil = "<img src=x onerror=document.title='owned'>"
    submission = Submission(problem=evil)  # bypasses the API, which rejects problems that the team cannot solve
    await served.backend.jobs.journal.write(lambda transaction: transaction.accept("evil", submission))
    await expect(page.locator("#jobs > li").first).to_contain_text(evil)
    await page.get_by_label("Problem", exact=True).fill(evil)
    await page.get_by_role("button", name="Solve", exact=True).click()
    await expect(page.locator("#submitted")).not_to_be_empty()
    assert await page.title() == "Troupe"


async def test_page_reconnects_after_a_restart(browser: Browser, tmp_path: Path) -> None:
    chosen = configured(tmp_path)
    async with service(chosen) as served:
        port = int(served.url.rsplit(":", 1)[1])
        page, _ = await open_page(browser, served.url)
        await expect(page.locator("#state")).to_contain_text("ready")
    await expect(page.locator("#state")).to_contain_text("not connected")
    again = chosen.model_copy(update={"service": chosen.service.model_copy(update={"port": port})})
    async with service(again) as served:
        await expect(page.locator("#state")).to_contain_text("ready")
        await served.client.post("/jobs", json={"problem": PROBLEM})
        await expect(page.locator("#jobs > li").first).to_contain_text("→ 17")


async def test_page_asks_for_a_token(start: Start, browser: Browser, tmp_path: Path) -> None:
    served = await start()
    secret = Tokens(tmp_path / "tokens.json").add("me", (Scope.READ,))
    page, _ = await open_page(browser, served.url)
    await page.get_by_label("Token", exact=True).fill(secret)
    await page.get_by_role("button", name="Use it").click()
    await expect(page.locator("#state")).to_contain_text("ready")
