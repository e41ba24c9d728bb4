"""`rlhf label` over HTTP as a browser uses it: rank, tie, fail, skip, change, several labellers, kill and come back."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import urlencode

import pytest

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.label import Config, label_server
from rlhf_trainer.labelling import page as label_page
from rlhf_trainer.labelling.instructions import CRITERIA
from rlhf_trainer.labelling.store import RankingItem, Store, read_tasks
from rlhf_trainer.prefs import Config as PrefsConfig
from rlhf_trainer.prefs import prepare

RECORDS = [
    {"prompt": "first <b>prompt</b>", "completions": ["alpha", "beta & \u00fc", "gamma\n</p><script>x</script>"]},
    {"prompt": "second", "completions": ["one", "two", "one"]},
    {"prompt": "third", "completions": ["left", "right"]},
    {"prompt": "all the same", "completions": ["same", "same"]},
]


class Page(HTMLParser):
    """What a person sees and can do: texts of class "text", the form's fields and choices, links."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.choices, self.hidden, self.links, self.whole = [], {}, {}, {}, ""
        self.checked, self.inside, self.link, self.tags = {}, False, None, Counter()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags[tag] += 1
        if attrs.get("class") == "text":
            self.texts.append("")
            self.inside = True
        if tag == "a":
            self.link = attrs["href"]
        if attrs.get("type") == "radio":
            self.choices.setdefault(attrs["name"], []).append(attrs["value"])
            if "checked" in attrs:
                self.checked[attrs["name"]] = attrs["value"]
        if attrs.get("type") == "hidden":
            self.hidden[attrs["name"]] = attrs["value"]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "p"
        self.link = None if tag == "a" else self.link

    def handle_data(self, data):
        self.whole += data
        if self.inside:
            self.texts[-1] += data
        if self.link:
            self.links[data] = self.link


class Browser:
    def __init__(self, port):
        self.port = port

    def request(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("localhost", self.port, timeout=20)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode("utf-8")
        connection.close()
        return response, text

    def get(self, path, status=200):
        response, text = self.request("GET", path)
        assert response.status == status, text
        return Page(text)

    def start(self, name):
        return self.get("/rank?" + urlencode({"labeller": name}))

    def send(self, page, ranks, status=303, **changes):
        """Fill the form: `ranks` by completion text. The page that follows."""
        shown = dict(zip(page.texts[1:], page.choices, strict=True))
        form = page.hidden | {shown[text]: str(rank) for text, rank in ranks.items()} | changes
        response, text = self.request("POST", "/rank", urlencode(form), Origin=f"http://localhost:{self.port}")
        assert response.status == status, text
        return self.get(response.headers["Location"]) if status == 303 else Page(text)


@pytest.fixture
def serve(tmp_path):
    """Function (**options) -> Browser of a server in a thread; the same files each time."""
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    running = []

    def begin(**options):
        server = label_server(Config(data=str(tmp_path / "c.jsonl"), port=0, **options))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        running.append(server)
        return Browser(server.server_port)

    def end():
        while running:
            server = running.pop()
            server.shutdown()
            server.server_close()
            server.store.close()

    begin.end, begin.out = end, tmp_path / "c.rankings.jsonl"
    yield begin
    end()


def answers(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_labeller_ranks_everything(serve):
    browser = serve(criterion="polite")
    page = browser.start("Ann")
    assert page.texts[0] == RECORDS[0]["prompt"]
    assert sorted(page.texts[1:]) == sorted(RECORDS[0]["completions"])
    assert list(page.choices.values()) == [["1", "2", "3", "F"]] * 3
    assert CRITERIA["polite"].question in page.whole
    assert page.tags["script"] == 0
    page = browser.send(page, dict(zip(RECORDS[0]["completions"], (2, 1, "F"), strict=True)))
    assert "Prompt 1 is saved" in page.whole
    assert [answer["rankings"][0]["ranks"] for answer in answers(serve.out)] == [[2, 1, "F"]]
    assert page.texts[0] == "second"
    assert sorted(page.texts[1:]) == ["one", "two"]  # the repeated completion is shown once
    page = browser.send(page, {"one": 1, "two": 1})
    page = browser.send(page, {"left": 2, "right": 1})
    assert "That was all" in page.whole
    found = answers(serve.out)
    assert [answer["rankings"][0]["ranks"] for answer in found] == [[2, 1, "F"], [1, 1, 1], [2, 1]]
    assert [{key: answer[key] for key in ("prompt", "completions")} for answer in found] == RECORDS[:3]


def test_prefs_reads_what_several_labellers_said(serve):
    browser = serve()
    for name, best in (("ann", "left"), ("bob", "right"), ("eve", "right")):
        page = browser.get("/rank?" + urlencode({"labeller": name, "task": 2}))
        browser.send(page, {text: 1 + (text != best) for text in ("left", "right")})
    result = prepare(PrefsConfig(data=[str(serve.out)], strict=True))
    assert [(pair.chosen, pair.rejected) for pair in result.pairs] == [("right", "left")]
    assert [one.name for one in result.agreement.labellers] == ["ann", "bob", "eve"]
    home = browser.get("/")
    assert set(home.links) == {"ann", "bob", "eve"}
    assert "1 of 3" in home.whole


def test_skip_comes_back_and_change_replaces(serve):
    browser = serve()
    page = browser.start("x")
    page = browser.get(page.links["Skip"])
    assert page.texts[0] == "second"
    after = browser.send(page, {"one": 1, "two": 2})
    assert after.texts[0] == "third"
    page = browser.get(after.links["Change it"])
    assert dict(zip(page.texts[1:], page.checked.values(), strict=True)) == {"one": "1", "two": "2"}
    after = browser.send(page, {"one": "F", "two": 1})
    assert [answer["rankings"][0]["ranks"] for answer in answers(serve.out)] == [["F", 1, "F"]]
    after = browser.send(after, {"left": 1, "right": 1})
    assert after.texts[0] == RECORDS[0]["prompt"]


def test_each_labeller_has_an_order_of_their_own_and_keeps_it():
    task = RankingItem("p", tuple("abcd"))
    orders = Counter(tuple(task.order(f"labeller {i}")) for i in range(240))
    assert len(orders) == 24
    assert {len([o for o in orders.elements() if o[0] == text]) > 30 for text in "abcd"} == {True}
    assert task.order("x") == task.order("x")


def test_incomplete_answers_are_not_saved_and_keep_what_was_chosen(serve):
    browser = serve()
    page = browser.get("/rank?labeller=x&task=2")
    for ranks in ({}, {"left": 1}, {"left": 1, "right": 3}, {"left": 1, "right": ""}, {"left": 1, "right": "f"}):
        again = browser.send(page, ranks, status=400)
        assert "every completion needs a rank" in again.whole
        assert list(again.checked.values()) == ["1"] * ("left" in ranks)
    assert not serve.out.exists()


def test_requests_that_are_no_answers(serve):
    browser = serve()
    page = browser.start("x")
    ranks = dict.fromkeys(RECORDS[0]["completions"], 1)
    assert "begin again" in browser.send(page, ranks, status=400, task="9").whole
    assert "begin again" in browser.send(page, ranks, status=400, task="-1").whole
    assert "begin again" in browser.send(page, ranks, status=400, labeller=" ").whole
    assert "at most 64" in browser.get("/rank?labeller=" + "x" * 65, status=400).whole
    assert "at most 64" in browser.get("/rank?labeller=%00", status=400).whole
    assert browser.get("/rank?labeller=x&task=99&after=-4&saved=z").texts[0] == RECORDS[0]["prompt"]
    browser.get("/other", status=404)
    assert browser.request("POST", "/rank", "x", **{"Content-Length": str((1 << 20) + 1)})[0].status == 400
    assert browser.request("POST", "/", "")[0].status == 400
    assert browser.request("POST", "/rank", "&".join(f"k{i}=1" for i in range(2000)))[0].status == 400
    assert not serve.out.exists()


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example:80"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
)
def test_other_sites_are_refused(serve, headers):
    browser = serve()
    page = browser.start("x")
    form = page.hidden | dict.fromkeys(page.choices, "1")
    assert browser.request("POST", "/rank", urlencode(form), **headers)[0].status == 403
    assert not serve.out.exists()
    assert browser.request("POST", "/rank", urlencode(form), Host="localhost")[0].status == 303


def test_names_are_escaped_and_spaces_do_not_count(serve):
    browser = serve()
    name = '<i>"O\'Neil"</i> &'
    page = browser.start(f"  {name}  ")
    browser.send(page, dict.fromkeys(RECORDS[0]["completions"], 1))
    assert browser.get("/").links.keys() == {name}
    assert browser.get(browser.get("/").links[name]).tags["i"] == 0
    assert answers(serve.out)[0]["rankings"][0]["labeller"] == name


def test_enough_labellers_per_prompt(serve):
    browser = serve(per_prompt=2)
    for name in ("a", "b"):
        browser.send(browser.start(name), dict.fromkeys(RECORDS[0]["completions"], 1))
    assert browser.start("c").texts[0] == "second"
    assert browser.start("a").texts[0] == "second"


def test_answers_survive_a_restart_and_a_torn_line(serve):
    browser = serve()
    browser.send(browser.start("x"), dict.fromkeys(RECORDS[0]["completions"], 2))
    serve.end()
    other = {"prompt": "of another file", "completions": ["q", "r"], "rankings": [{"labeller": "x", "ranks": [1, 2]}]}
    whole = serve.out.read_bytes() + json.dumps(other).encode() + b"\n"
    serve.out.write_bytes(whole + b'{"prompt": "second", "compl')
    browser = serve()
    assert serve.out.read_bytes() == whole
    page = browser.start("x")
    assert page.texts[0] == "second"
    browser.send(browser.get("/rank?labeller=x&task=0"), dict.fromkeys(RECORDS[0]["completions"], 1))
    browser.send(page, {"one": 1, "two": 2})
    found = answers(serve.out)
    assert [(answer["prompt"], answer["rankings"][0]["ranks"]) for answer in found] == [
        ("of another file", [1, 2]), (RECORDS[0]["prompt"], [1, 1, 1]), ("second", [1, 2, 1])
    ]  # fmt: skip


def test_many_labellers_at_once(serve):
    browser = serve()
    names = [f"n{i}" for i in range(8)]

    def label(name):
        page = browser.start(name)
        for record in RECORDS[:3]:
            page = browser.send(page, dict.fromkeys(record["completions"], 1))

    threads = [threading.Thread(target=label, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Counter((answer["prompt"], answer["rankings"][0]["labeller"]) for answer in answers(serve.out))
    assert found == Counter((record["prompt"], name) for record in RECORDS[:3] for name in names)


def test_a_full_disk_is_said_and_leaves_the_file_as_it_was(serve, monkeypatch):
    browser = serve()
    first = browser.send(browser.start("x"), dict.fromkeys(RECORDS[0]["completions"], 1))
    before = serve.out.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    page = browser.send(first, {"one": 1, "two": 2}, status=500)
    assert "No space left on device" in page.whole
    assert sorted(page.checked.values()) == ["1", "2"]
    browser.send(browser.get("/rank?labeller=x&task=0"), dict.fromkeys(RECORDS[0]["completions"], 2), status=500)
    monkeypatch.undo()
    assert serve.out.read_bytes() == before
    assert browser.start("x").texts[0] == "second"
    browser.send(page, {"one": 1, "two": 2})
    assert len(answers(serve.out)) == 2


def test_one_server_per_file(serve, tmp_path):
    serve()
    with pytest.raises(UserError, match=r"c\.rankings\.jsonl: another `rlhf label` writes to it"):
        serve()
    serve.end()
    browser = serve()
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{browser.port}: address already in use"):
        label_server(Config(data=str(tmp_path / "c.jsonl"), output=str(tmp_path / "o.jsonl"), port=browser.port))


def test_command_line_kill_and_come_back(tmp_path):
    """Every answer that was confirmed is there after kill -9; SIGTERM ends in order."""
    data = tmp_path / "c.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    command = [sys.executable, "-m", "rlhf_trainer", "label", str(data), "--port", "0"]
    for deadly, before in ((signal.SIGKILL, 0), (signal.SIGTERM, 1)):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            line = next(line for line in process.stderr if "open http" in line)
            browser = Browser(int(re.search(r":(\d+)/", line)[1]))
            page = browser.start("x")
            assert f"{before} of 3 ranked" in page.whole
            browser.send(page, dict.fromkeys(page.texts[1:], 1))
            process.send_signal(deadly)
            rest = process.stderr.read()
            code = process.wait(timeout=30)
        assert (code, "x: 2" in rest) == ((-9, False) if deadly == signal.SIGKILL else (0, True))
    found = answers(tmp_path / "c.rankings.jsonl")
    assert [answer["prompt"] for answer in found] == [record["prompt"] for record in RECORDS[:2]]


def test_own_instructions_are_shown(serve, tmp_path):
    (tmp_path / "i.md").write_text("# Rank\n\nThe **short <one>** wins.\n\n- a\n- b\n\n1. c\n\nend\n")
    page = serve(instructions=str(tmp_path / "i.md")).start("x")
    assert "The short <one> wins." in page.whole
    expected = "<h1>Rank</h1>|<p>The <strong>short &lt;one&gt;</strong> wins.</p>|<ul>|<li>a</li>|<li>b</li>|</ul>"
    html = label_page.markdown((tmp_path / "i.md").read_text()).replace("\n", "|")
    assert html == expected + "|<ol>|<li>c</li>|</ol>|<p>end</p>"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--data is needed"),
        (["{d}", "--output", "{d}"], "is a file that is read; the result needs one of its own"),
        (["{d}", "--output", "r.jsonl.gz"], "it grows by an answer at a time, uncompressed; name it .jsonl"),
        (["{d}", "--criterion", "nice"], "--criterion nice: not one of"),
        (["{d}", "--instructions", "none.md"], "none.md: no such file"),
        (["{d}", "--per_prompt", "-1"], "--per_prompt -1: must be at least 0"),
        (["{d}", "--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        (["{d}", "--port", "99999"], "cannot listen on 127.0.0.1:99999"),
        (["{e}"], "no prompt with at least two different completions"),
        (["{f}"], "f.jsonl:1: field 'completions' must be a list"),
    ],
)
def test_refused_in_one_sentence(tmp_path, capsys, arguments, error):
    lines = {"d": RECORDS[0], "e": RECORDS[3], "f": {"prompt": "p"}}
    files = {name: str(tmp_path / f"{name}.jsonl") for name in lines}
    for name, record in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    assert main(["label", *(argument.format(**files) for argument in arguments)]) == 2
    text = capsys.readouterr().err
    assert error in text
    assert text.count("\n") == 1


def test_a_store_for_the_same_tasks_twice(tmp_path):
    (tmp_path / "c.jsonl").write_text((json.dumps(RECORDS[2]) + "\n") * 2)
    tasks = read_tasks(tmp_path / "c.jsonl")
    assert len(tasks) == 1
    store = Store(tasks, tmp_path / "deep" / "r.jsonl")
    store.save(0, "x", {"left": 1, "right": 2})
    assert store.next_task("x") is None
    assert store.next_task("y") == 0
    store.close()


def test_open_to_the_network_by_its_name(serve):
    browser = serve(host="0.0.0.0")
    browser.start("x")
    assert browser.request("GET", "/", Host="lab.example:1")[0].status == 200
    assert browser.request("GET", "/", Host="lab.example:1", Origin="http://evil.example")[0].status == 403
