"""The server's page in a real browser: reading, asking, and everything that can go wrong."""

import re

import httpx
import pytest

import browser
from page_engine import MODEL, running

pytestmark = pytest.mark.skipif(bool(browser.why_not()), reason=browser.why_not() or "")

REPORT = ("report.txt", "The number is 7. " * 2000)
PROMPT = 25  # tokens of "Which number?" with the template around it
PHONE = {"width": 360, "height": 740}
KEYS = {"api_keys": ("secret",)}
SET_KEY = "key => sessionStorage.setItem('star-attention-api-key', key)"


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as running_browser:
        yield running_browser


@pytest.fixture
def server(request):
    """A server of the test's own; its parameter: options of the front."""
    with running(**getattr(request, "param", {})) as server:
        yield server
        server.engine.gate.set()


@pytest.fixture
def engine(server):
    return server.engine


@pytest.fixture
def page(chromium, server):
    """Its page. Whatever the browser complains of fails the test, but for what it says of answers
    that are no success. `page.asked`: the bodies of questions."""
    complaints = []

    def complain(message):
        refused = message.text.startswith("Failed to load resource:")
        asset = "/page/" in message.location["url"]
        if message.type in ("error", "warning") and (asset or not refused):
            complaints.append(message.text)

    def note(request):
        if request.url.endswith("/v1/chat/completions"):
            page.asked.append(request.post_data_json)

    page = chromium.new_page()
    page.asked = []
    page.set_default_timeout(10_000)
    page.on("console", complain)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", note)
    page.on("filechooser", lambda _: None)  # so that choosers are caught from the beginning
    page.goto(server.url)
    yield page
    page.close()
    assert complaints == []


def expect(locator):
    from playwright.sync_api import expect

    expect.set_options(timeout=15_000)
    return expect(locator)


def read(page, *files, wait=True):
    """Chooses the files; waits until they are read."""
    page.set_input_files("#files", [as_file(*file) for file in files or [REPORT]])
    if wait:
        expect(page.locator("#numbers")).to_contain_text("read in")


def as_file(name, text):
    return {"name": name, "mimeType": "text/plain", "buffer": text.encode()}


def drop(page, *files):
    script = """files => {
        const transfer = new DataTransfer();
        for (const [name, text] of files) transfer.items.add(new File([text], name));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, [list(file) for file in files])
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("drop over")
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def ask(page, question):
    """The card of the question."""
    page.fill("#question", question)
    page.click("#ask-button")
    return page.locator("article", has=page.get_by_role("heading", name=question, exact=True))


def metric(card, name):
    return card.locator(f".metrics div:has(dt:text-is('{name}')) dd").last


def test_a_dropped_file_is_read_and_two_questions_are_answered_at_once(page, server, engine):
    engine.gate.clear()
    drop(page, REPORT, ("log.txt", "ä" * 500))
    numbers = page.locator("#numbers")
    expect(numbers).to_have_text(re.compile(r"^[\d,]+ of [\d,]+ tokens · .* s · .* tokens/s$"))
    (context,) = server.app.contexts
    tokens = len(context.token_ids)
    expect(numbers).to_contain_text(f"of {tokens:,} tokens")
    expect(page.get_by_role("progressbar", name="Read")).to_have_js_property("max", 1)
    expect(page.get_by_role("img")).to_have_accessible_name("0 of 9 blocks on 3 ranks are there")
    expect(page.locator("#legend li")).to_have_count(3)
    expect(page.locator("#name")).to_have_text("report.txt, log.txt")
    expect(page.locator("#name")).to_be_focused()
    engine.gate.set()
    expect(numbers).to_contain_text(f"{tokens:,} tokens read in")
    expect(page.get_by_role("img")).to_have_accessible_name("9 of 9 blocks on 3 ranks are there")
    expect(page.get_by_role("status")).to_contain_text("You can ask now.")

    first, second = ask(page, "a long one"), ask(page, "Which number?")
    answer = "You asked “Which number?”: naïve 🙂."
    expect(second.locator(".answer")).to_have_text(answer)
    expect(first).to_have_attribute("aria-busy", "true")
    expect(second).to_have_attribute("aria-busy", "false")
    expect(metric(second, "prompt tokens")).to_have_text(f"{tokens + PROMPT:,}")
    expect(metric(second, "cached")).to_have_text(f"{tokens:,} (99.9\u00a0%)")
    expect(metric(second, "answer tokens")).to_have_text(f"{len(answer.encode()) + 1}")
    expect(metric(second, "first token")).to_have_text(re.compile(r"^\d\.\d\d s$"))
    expect(metric(second, "tokens/s")).to_have_text(re.compile(r"^[\d,.]+$"))
    assert page.asked[1] == {
        "model": MODEL,
        "context": context.name,
        "messages": [{"role": "user", "content": "Which number?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": 512,
    }


def test_several_lines_are_several_questions(page):
    read(page)
    page.check("#by-line")
    page.fill("#question", "one?\n\n two?\nthree?")
    expect(page.locator("#ask-button")).to_have_text("Ask 3 questions")
    page.click("#ask-button")
    expect(page.locator("article h3")).to_have_text(["one?", "two?", "three?"])
    expect(page.locator("article .answer")).to_contain_text(["“one?”", "“two?”", "“three?”"])


def test_answers_leave_a_connection_for_the_rest(page):
    read(page)
    page.check("#by-line")
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens of an answer").fill("20000")
    page.fill("#question", "\n".join(f"a long one, {i}" for i in range(7)))
    page.click("#ask-button")
    cards = page.locator("article")
    for i in range(5):
        expect(cards.nth(i).locator(".answer")).to_contain_text("on on")
    waits = "Waits until an earlier answer ends."
    expect(cards.filter(has_text=waits)).to_have_count(2)
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.locator("#about")).to_contain_text("pinned")
    cards.nth(5).get_by_role("button", name="Stop").click()
    cards.nth(0).get_by_role("button", name="Stop").click()
    expect(cards.nth(6).locator(".answer")).to_contain_text("on on")
    expect(cards.filter(has_text="Stopped.")).to_have_count(2)


def test_cached_blocks_are_there_at_once(page, engine):
    engine.gate.clear()
    engine.sources = ("gpu", "new", "host", "disk")
    engine.block = 5000
    read(page, wait=False)
    expect(page.get_by_role("img")).to_have_accessible_name("5 of 7 blocks on 4 ranks are there")
    expect(page.locator("#numbers")).to_contain_text(re.compile("24,00. were cached"))
    ranks = page.locator("#legend li")
    expect(ranks.nth(0)).to_contain_text("rank 0 2 blocks, 1 from GPU cache")
    expect(ranks.nth(1)).to_have_text("rank 1 2 blocks, 1 from host memory, 1 from disk")
    fills = page.eval_on_selector_all(
        "#picture .query g rect:last-child", "all => all.map(r => r.getAttribute('fill'))"
    )
    assert fills[:3] == ["url(#cached-0)", "var(--rank)", "url(#cached-1)"]
    engine.gate.set()
    expect(page.locator("#numbers")).to_contain_text("10,000 tokens read in")


def test_reading_is_cancelled(page, server, engine):
    engine.gate.clear()
    read(page, wait=False)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#no-contexts")).to_be_visible()
    expect(page.locator("#drop")).to_be_focused()
    expect(page.locator("#welcome")).to_be_visible()
    server.wait_until_idle()
    assert list(server.app.contexts) == []


def test_a_question_waits_for_its_context(page, engine):
    engine.gate.clear()
    read(page, wait=False)
    card = ask(page, "early?")
    expect(card).to_contain_text("Waits until the context is read.")
    stopped = ask(page, "too early?")
    stopped.get_by_role("button", name="Stop").click()
    expect(stopped).to_contain_text("Stopped.")
    assert page.asked == []
    engine.gate.set()
    expect(card.locator(".answer")).to_contain_text("“early?”")


def test_a_follow_up_sends_what_was_said(page):
    read(page)
    card = ask(page, "First?")
    follow_up = card.get_by_role("textbox", name="Follow-up question")
    follow_up.fill("And then?")
    follow_up.press("Control+Enter")
    expect(card.locator(".answer").last).to_contain_text("“And then?”")
    assert page.asked[1]["messages"] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "You asked “First?”: naïve 🙂."},
        {"role": "user", "content": "And then?"},
    ]
    expect(follow_up).to_be_focused()


def test_an_answer_is_stopped(page, server):
    read(page)
    card = ask(page, "a long one")
    expect(card.locator(".answer")).to_contain_text("on on")
    card.get_by_role("button", name="Stop").click()
    expect(card).to_contain_text("Stopped.")
    expect(card.get_by_role("textbox")).to_be_focused()
    server.wait_until_idle()


def test_settings_are_sent(page):
    read(page)
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens of an answer").fill("3")
    page.get_by_label("Temperature").fill("0.7")
    card = ask(page, "Short?")
    expect(card).to_contain_text("Cut at the most tokens of an answer (Settings).")
    assert (page.asked[0]["max_tokens"], page.asked[0]["temperature"]) == (3, 0.7)
    page.get_by_label("Temperature").fill("7")
    page.get_by_text("Settings", exact=True).click()
    ask(page, "Not asked")
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert len(page.asked) == 1


def test_pinning_and_deleting(page, server, engine):
    read(page)
    expect(page.locator("#about")).to_contain_text("kept")
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.locator("#contexts")).to_contain_text("being read")
    expect(page.locator("#about")).to_contain_text("pinned")
    expect(page.locator("#contexts")).to_contain_text("pinned")
    assert len(engine.held) == 1
    page.get_by_role("button", name="Unpin").click()
    expect(page.locator("#about")).to_contain_text("kept")

    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("button", name="Yes, delete")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Delete", exact=True)).to_be_focused()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Yes, delete").click()
    expect(page.locator("#no-contexts")).to_be_visible()
    assert list(server.app.contexts) == []


def test_contexts_of_others_are_chosen_and_may_go(page, server):
    read(page)
    read(page, ("other.txt", "x" * 9000))
    ask(page, "About other?")
    made = {"text": "by a program", "name": "notes-7", "ttl_seconds": 3600, "pinned": True}
    httpx.post(f"{server.url}/v1/contexts", json=made).raise_for_status()
    page.reload()
    rows = page.locator("#contexts button")
    expect(rows).to_contain_text(["notes-7", "other.txt", "report.txt"])
    expect(rows.nth(0)).to_contain_text("kept for 60 min, pinned")
    rows.nth(2).click()
    expect(page.locator("#name")).to_have_text("report.txt")
    expect(rows.nth(2)).to_have_attribute("aria-current", "true")
    expect(page.get_by_role("img")).to_have_accessible_name("9 of 9 blocks on 3 ranks are there")
    card = ask(page, "First?")
    expect(card.locator(".answer")).to_contain_text("“First?”")
    rows.nth(0).click()
    expect(page.locator("article")).to_have_count(0)
    rows.nth(2).click()
    expect(page.locator("article")).to_have_count(1)
    httpx.delete(f"{server.url}/v1/contexts/{page.asked[-1]['context']}").raise_for_status()
    expect(ask(page, "Second?").get_by_role("alert")).to_contain_text("there is no context")
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.locator("#context-error")).to_contain_text("there is no context")


def test_what_is_read_for_others_is_not_said_to_be_there(page, server, engine):
    engine.gate.clear()
    made = {"text": "x" * 20_000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/contexts", json=made) as response:
        assert response.is_success
        page.reload()
        row = page.locator("#contexts button")
        expect(row).to_contain_text("being read")
        row.click()
        expect(page.get_by_role("img")).to_have_accessible_name(
            "0 of 5 blocks on 3 ranks are there"
        )
        engine.gate.set()
        response.read()
    expect(row).to_contain_text("kept")
    expect(page.get_by_role("img")).to_have_accessible_name("5 of 5 blocks on 3 ranks are there")


def test_text_is_pasted(page, server):
    page.get_by_text("Paste text").click()
    page.get_by_label("Name").fill("my notes")
    page.get_by_label("Text", exact=True).fill("The number is 9. " * 300)
    page.get_by_label("Pin: it stays on the ranks").check()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Read it").click()
    expect(page.locator("#numbers")).to_contain_text("read in")
    expect(page.locator("#name")).to_have_text("my notes")
    expect(page.locator("#about")).to_contain_text("pinned")
    (context,) = server.app.contexts
    assert context.bytes == 17 * 300


def test_errors_are_shown_where_they_belong_in_their_words(page, engine):
    read(page, ("binary.pdf", "a\0b"), wait=False)
    expect(page.locator("#context-error")).to_have_text(
        "the file binary.pdf is binary: use a text file"
    )
    expect(page.locator("#ask")).to_be_hidden()
    page.get_by_role("button", name="Dismiss").click()
    engine.refuses = "the context does not fit: use more ranks"
    read(page, wait=False)
    expect(page.locator("#context-error")).to_have_text(engine.refuses)
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator("#no-contexts")).to_be_visible()
    engine.refuses = None
    read(page)
    refused, broken = ask(page, "fail?"), ask(page, "break?")
    expect(refused.get_by_role("alert")).to_have_text("This cannot be answered: fail?")
    expect(broken.get_by_role("alert")).to_have_text("A rank was lost: break?")
    expect(broken.locator(".answer")).to_have_text("You asked")


@pytest.mark.parametrize("server", [KEYS], indirect=True)
def test_a_key_is_asked_for_and_kept_in_this_tab(page):
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    expect(page.locator("#key-reason")).to_contain_text("there is no API key")
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#key-reason")).to_contain_text("the API key is not known")
    key.fill("secret")
    key.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#model")).to_have_text(MODEL)
    read(page)
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]

    page.evaluate(SET_KEY, "old")
    card = ask(page, "Which?")
    key.fill("secret")
    key.press("Enter")
    expect(card.locator(".answer")).to_contain_text("“Which?”")
    page.evaluate(SET_KEY, "old")
    card = ask(page, "Who?")
    page.locator("#key-cancel").click()
    expect(card.get_by_role("alert")).to_contain_text("the API key is not known")


def test_a_server_that_is_not_ready_is_asked_again(page, server, engine):
    expect(page.locator("#state")).to_have_text("ready")
    server.call(engine.lose, "rank 1 was killed")
    page.reload()
    expect(page.locator("#banner")).to_have_text(
        "The server is not ready: rank 1 was killed. Trying again …"
    )
    expect(page.locator("#state")).to_have_text("not ready")
    read(page, wait=False)
    expect(page.locator("#context-error")).to_have_text("the engine is starting: rank 1 was killed")
    server.call(engine.restart)
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("ready")


def test_a_server_that_is_gone_is_said_to_be(page):
    page.route("**/health", lambda route: route.abort())
    page.reload()
    expect(page.locator("#banner")).to_contain_text("The server cannot be reached.")


def tab_to(page, selector, key="Tab"):
    for _ in range(40):
        page.keyboard.press(key)
        focused = page.evaluate(
            """selector => {
                const at = document.activeElement;
                const { outlineStyle, outlineWidth } = getComputedStyle(at);
                const html = at.outerHTML.slice(0, 99);
                return [at.matches(selector), outlineStyle, outlineWidth, html];
            }""",
            selector,
        )
        assert focused[3].startswith("<body") or focused[1:3] == ["solid", "2px"], focused
        if focused[0]:
            return
    raise AssertionError(f"the Tab key does not lead to {selector}")


def test_everything_with_the_keyboard_alone(page):
    tab_to(page, "#drop")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([as_file(*REPORT)])
    expect(page.locator("#numbers")).to_contain_text("read in")
    tab_to(page, "#question")
    page.keyboard.type("Which?")
    page.keyboard.press("Control+Enter")
    page.keyboard.type("a long one")
    page.keyboard.press("Meta+Enter")
    expect(page.locator("article .answer")).to_contain_text(["on on", "“Which?”"])
    tab_to(page, "article button")
    page.keyboard.press("Enter")
    expect(page.locator("article").first).to_contain_text("Stopped.")
    tab_to(page, "#pin", "Shift+Tab")
    page.keyboard.press("Space")
    expect(page.locator("#about")).to_contain_text("pinned")
    tab_to(page, "#contexts button", "Shift+Tab")
    page.keyboard.press("Enter")
    tab_to(page, "#delete")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#no-contexts")).to_be_visible()
    expect(page.locator("#drop")).to_be_focused()


WIDE = """() => [...document.querySelectorAll("body *")]
    .filter(node => node.getBoundingClientRect().right > innerWidth + 0.5)
    .filter(node => !node.closest("svg, .unseen"))
    .map(node => node.outerHTML.slice(0, 80))"""

# Visible text whose contrast to what is behind it is below 4.5 (WCAG AA).
PALE = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (color, under) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const layer of [under, color]) {
            if (layer) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
        }
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const ground = node => {
        const color = node ? getComputedStyle(node).backgroundColor : "white";
        if (rgba(color)[3] === 255) return color;
        return `rgb(${rgba(color, ground(node.parentElement)).slice(0, 3)})`;
    };
    const light = color => {
        const [r, g, b] = rgba(color).map(byte => byte / 255).map(
            c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const says = node => node.checkVisibility()
        && [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    return [...document.querySelectorAll("body *")].filter(says).flatMap(node => {
        const text = node.closest("svg") ? "fill" : "color";
        const [a, b] = [light(getComputedStyle(node)[text]), light(ground(node))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return contrast < 4.5 ? [`${contrast.toFixed(2)} ${node.outerHTML.slice(0, 80)}`] : [];
    });
}"""


@pytest.mark.parametrize("server", [KEYS], indirect=True)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling_and_text_has_contrast(page, engine, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.evaluate(SET_KEY, "secret")
    page.reload()
    page.set_viewport_size(PHONE)
    engine.sources = ("new", "disk")
    assert page.evaluate(WIDE) == []
    read(page, ("a_name_without_any_space_" * 8 + ".txt", "x" * 90_000), ("b.txt", "y"))
    ask(page, "x" * 300)
    ask(page, "fail " + "y" * 300)
    ask(page, "a long one")
    page.get_by_text("Settings").click()
    page.get_by_text("Paste text").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("article .answer").first).to_contain_text("on on")
    page.evaluate(SET_KEY, "old")
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.locator("#key-form")).to_be_visible()
    assert page.evaluate(WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate(PALE) == []
    assert page.evaluate("document.getAnimations().length") == 0


def test_no_text_becomes_markup(page, engine):
    attack = "<img src=x onerror='document.title=`struck`'><script>document.title='struck'</script>"
    engine.answers[attack] = f"answer {attack}"
    read(page, (attack.replace("/", "|"), attack * 300))
    answered = ask(page, attack)
    expect(answered.locator(".answer")).to_have_text(f"answer {attack}")
    failed = ask(page, f"fail {attack}")
    expect(failed.get_by_role("alert")).to_have_text(f"This cannot be answered: fail {attack}")
    expect(page.locator("#name")).to_contain_text("<img src=x")
    expect(page.locator("#contexts b")).to_contain_text("<img src=x")
    engine.refuses = attack
    read(page, wait=False)
    expect(page.locator("#context-error")).to_have_text(attack)
    assert page.locator("body img").count() == 1
    assert page.locator("body script").count() == 0
    assert page.title() == "Star Attention"


STREAM = (
    ': comment\ndata: {"a": "naïve 🙂"}\n\ndata: 1\ndata:2\n\r\n'
    "event: x\r\ndata: three\r\n\r\ndata: four\r\rdata: [DONE]\n\ndata: cut"
)


def test_events_are_the_same_however_the_stream_is_cut(page):
    found = page.evaluate(
        """async text => {
            const { events } = await import("/page/sse.js");
            const bytes = new TextEncoder().encode(text);
            const parse = async cuts => {
                const body = new ReadableStream({
                    start(controller) {
                        cuts.forEach((cut, i) => controller.enqueue(bytes.slice(cut, cuts[i + 1])));
                        controller.close();
                    },
                });
                const found = [];
                for await (const data of events(body)) found.push(data);
                return JSON.stringify(found);
            };
            const found = new Set([await parse([0]), await parse([...bytes.keys()])]);
            for (let i = 1; i < bytes.length; i += 1) {
                for (const step of [1, 2, 7]) {
                    found.add(await parse([0, i, Math.min(i + step, bytes.length)]));
                }
            }
            return [...found].map(JSON.parse);
        }""",
        STREAM,
    )
    assert found == [['{"a": "naïve 🙂"}', "1\n2", "three", "four", "[DONE]"]]
