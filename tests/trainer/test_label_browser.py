"""`rlhf label` in a headless Chromium: what only a browser shows. Skipped where there is none."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from rlhf_trainer.label import Config, label_server

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def browser_page():
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1200, "height": 800})
        browser.close()


def test_a_person_ranks_and_sees_the_instructions(tmp_path, browser_page):
    page, problems = browser_page, []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    records = [{"prompt": f"prompt {i}", "completions": ["long " * 400, "<b>bold</b>", "c"]} for i in range(2)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    server = label_server(Config(data=str(tmp_path / "c.jsonl"), port=0))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    out = tmp_path / "c.rankings.jsonl"
    try:
        page.goto(server.url)
        page.get_by_label("Your name").fill("Ann")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("button", name="Save and go on").click()  # the browser itself asks for the missing ranks
        assert page.title() == "Prompt 1 of 2"
        assert not out.exists()
        given = {}
        for index, rank in enumerate(("2", "1", "F")):
            field = page.locator("fieldset").nth(index)
            given[field.locator(".text").inner_text()] = rank
            field.get_by_label(rank, exact=True).check()
        page.mouse.wheel(0, 4000)
        assert page.get_by_role("heading", name="How to rank").is_visible()
        box = page.locator("aside").bounding_box()
        assert 0 <= box["y"] < 800  # still in view beside the long completion
        page.get_by_role("button", name="Save and go on").click()
        assert "Prompt 1 is saved" in page.locator(".note").inner_text()
        assert page.title() == "Prompt 2 of 2"
        page.reload()  # does not send the answer again
        record = json.loads(out.read_text())
        ranks = [str(rank) for rank in record["rankings"][0]["ranks"]]
        assert ranks == [given[text] for text in records[0]["completions"]]
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.get_by_role("heading", name="How to rank").is_visible()
    finally:
        server.shutdown()
        server.server_close()
        server.store.close()
    assert not problems
