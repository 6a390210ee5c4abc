"""A person's choices: kept at once, taken back, gone on with; sides that say nothing; the server that asks for them."""

import http.client
import json
from pathlib import Path

import pytest
from PIL import Image

import runs
from mlcm_rl.data.pairs import PairTable
from mlcm_rl.preference import labels
from mlcm_rl.preference.labels import NEITHER, SIDES


def red(path: Path) -> int:
    with Image.open(path) as image:
        return image.getpixel((0, 0))[0]


def table(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]


# ---- kept ----


def test_the_picture_on_the_side_that_is_chosen_stands_in_the_table_as_chosen(choices):
    seen = []
    for number, side in enumerate(["left", "right", NEITHER, "left", "right"]):
        if side != NEITHER:
            other = SIDES[1 - SIDES.index(side)]
            seen.append([red(choices.picture(number, one)) for one in (side, other)])
        choices.choose(number, side)
    rows = table(choices.out)
    assert [row["prompt"] for row in rows] == [runs.PROMPTS[i] for i in (0, 1, 3, 4)]
    assert [[red(choices.out / row[name]) for name in ("chosen", "rejected")] for row in rows] == seen
    assert [one.prompt for one in PairTable(choices.out).prompts] == [row["prompt"] for row in rows]
    assert PairTable(choices.out).pictures(2, 8)[:, 0, 0, 0].tolist() == seen[2]


def test_a_side_says_nothing_about_the_sample(choices, opened):
    left = [choices.sample_at(number, "left") for number in range(400)]
    assert [1 - one for one in left] == [choices.sample_at(number, "right") for number in range(400)]
    assert 160 < sum(left) < 240  # four standard deviations
    again, other = opened(choices.out), opened(choices.out / "other", seed=1)
    assert left == [again.sample_at(number, "left") for number in range(400)]
    assert 160 < sum(one != other.sample_at(number, "left") for number, one in enumerate(left)) < 240


def test_choices_are_kept_at_once_and_the_same_command_goes_on_after_them(choices, opened):
    choices.choose(0, "left")
    choices.choose(1, NEITHER)
    again = opened(choices.out)  # as after a kill: nothing was closed
    assert again.judgements() == [choices.sample_at(0, "left"), None]
    again.choose(2, "right")
    assert len(choices.judgements()) == len(table(choices.out)) + 1 == 3  # and the first one knows of the other's


def test_the_last_choice_can_be_taken_back(choices):
    choices.choose(0, "left")
    choices.choose(1, "left")
    choices.undo(1)
    choices.choose(1, "right")
    assert choices.judgements() == [choices.sample_at(0, "left"), choices.sample_at(1, "right")]
    choices.undo(1)
    choices.undo(0)
    assert (choices.judgements(), table(choices.out)) == ([], [])


@pytest.mark.parametrize("change", [lambda one: one.choose(0, "left"), lambda one: one.choose(2, "left")])
def test_a_choice_out_of_turn_changes_nothing(choices, change):
    choices.choose(0, "right")
    before = choices.judgements()
    with pytest.raises(ValueError, match="is not the one to be judged now, 1 is"):
        change(choices)
    with pytest.raises(ValueError, match="is not the last one judged, 0 is"):
        choices.undo(1)
    assert choices.judgements() == before


def test_more_prompts_can_be_asked_for_and_fewer_leave_the_others_choices_be(choices, opened):
    fewer = opened(choices.out, prompts=choices.prompts[:2])
    for number in range(2):
        fewer.choose(number, "left")
    with pytest.raises(ValueError, match="not the one to be judged"):
        fewer.choose(2, "left")
    opened(choices.out).choose(2, "left")
    assert len(opened(choices.out, prompts=choices.prompts[:1]).rows()) == 1
    assert len(opened(choices.out).rows()) == 3


def test_a_folder_with_another_table_is_refused(choices, opened, tmp_path):
    with pytest.raises(ValueError, match="holds a table of seed 0, not 1: take another folder"):
        opened(choices.out, seed=1)
    with pytest.raises(ValueError, match="not made by this command"):
        opened(Path(runs.write_pairs(tmp_path / "given")))


def test_only_what_is_missing_is_to_be_drawn(choices):
    assert labels.num_sampled(choices.prompts, choices.out) == 6
    (choices.out / labels.sample_names(4)[1]).unlink()
    assert labels.num_sampled(choices.prompts, choices.out) == 4
    assert labels.num_sampled(choices.prompts[:3], choices.out) == 3


# ---- asked for ----


class Client:
    """A browser's requests, without the browser."""

    def __init__(self, served):
        self.port, self.stopped = served.port, served.stopped

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        result = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        return result

    def post(self, path: str) -> tuple[int, dict]:
        status, body, _ = self.ask("POST", path, Origin=f"http://127.0.0.1:{self.port}")
        return status, json.loads(body) if body.startswith(b"{") else {}


@pytest.fixture
def client(served) -> Client:
    return Client(served)


def test_the_server_shows_pair_after_pair_and_stops_when_the_person_is_done(client, choices):
    _, body, headers = client.ask("GET", "/pair")
    assert json.loads(body) == {"number": 0, "total": 6, "kept": 0, "prompt": "a cat", "language": "en"}
    assert headers["cache-control"] == "no-store"
    assert client.post("/finish")[0] == 409
    for number in range(6):
        for side in SIDES:
            status, picture, headers = client.ask("GET", f"/pictures/{number}/{side}")
            assert (status, headers["content-type"]) == (200, "image/png")
            assert picture == choices.picture(number, side).read_bytes()
        status, shown = client.post(f"/choices/{number}/{'neither' if number == 3 else 'left'}")
        assert (status, shown["number"]) == (200, number + 1)
    assert shown == {"number": 6, "total": 6, "kept": 5}
    assert client.post("/undo/5") == (
        200,
        {"number": 5, "total": 6, "kept": 4, "prompt": "a snowman", "language": "en"},
    )
    client.post("/choices/5/right")
    assert not client.stopped.is_set()
    assert client.post("/finish")[0] == 200
    assert client.stopped.is_set()
    assert len(table(choices.out)) == 5


def test_a_window_that_is_behind_is_told_where_things_stand_and_chooses_nothing(client, choices):
    client.post("/choices/0/left")
    status, shown = client.post("/choices/0/right")  # a second click, or another window
    assert (status, shown["number"], shown["prompt"]) == (409, 1, "a dog")
    assert client.post("/undo/3")[0] == 409
    assert choices.judgements() == [choices.sample_at(0, "left")]


def test_no_other_page_reads_or_chooses(client, choices):
    at = f"127.0.0.1:{client.port}"
    assert client.ask("GET", "/pair", Host=f"localhost:{client.port}")[0] == 200
    for path in ("/", "/pair", "/pictures/0/left"):
        assert client.ask("GET", path, Host=f"rebound.example:{client.port}")[0] == 400
    rebound = {"Host": "rebound.example", "Origin": "http://rebound.example"}
    assert client.ask("POST", "/choices/0/left", **rebound)[0] == 400
    for origin in ({}, {"Origin": "null"}, {"Origin": "http://other.example"}, {"Origin": "http://127.0.0.1:1"}):
        for path in ("/choices/0/left", "/undo/0", "/finish"):
            assert client.ask("POST", path, **origin)[0] == 403
    assert client.ask("GET", "/choices/0/left", Origin=f"http://{at}")[0] == 405
    assert choices.judgements() == []
    assert not client.stopped.is_set()


@pytest.mark.parametrize(
    "path",
    ["/pictures/6/left", "/pictures/0/middle", "/pictures/0/neither", "/pictures/-1/left", "/pictures/0/000000-0.png",
     "/pictures/0/..%2f..%2fprogress.json", "/pictures/../progress.json", "/progress.json", "/metadata.jsonl"],
)  # fmt: skip
def test_a_request_names_no_file(client, path):
    status, body, _ = client.ask("GET", path)
    assert (status, b"Not Found" in body) == (404, True)


def test_what_is_neither_a_side_nor_a_turn_is_refused(client, choices):
    for path in ("/choices/0/middle", "/choices/-1/left", "/choices/one/left", "/undo/-1"):
        assert client.post(path)[0] == 404
    assert client.post(f"/choices/{10**30}/left")[0] == 409
    assert choices.judgements() == []


def test_the_page_holds_all_it_needs_and_runs_only_its_own_script(client):
    _, body, headers = client.ask("GET", "/")
    page, policy = body.decode(), headers["content-security-policy"]
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}">' in page
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not any(text in page for text in ("http://", "https://", "src=", "@import", "url("))
    assert nonce not in client.ask("GET", "/")[2]["content-security-policy"]


def test_a_port_that_is_taken_is_told(choices):
    label_page = pytest.importorskip("mlcm_rl.cli.label_page", reason="the extra `label` is not installed")
    with label_page.listen(0) as taken:
        number = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match=f"port {number} of this machine cannot be used: .*another --port, or none"):
            label_page.serve(choices, number)
