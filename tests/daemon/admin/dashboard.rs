//! The dashboard, as a browser shows it and as a person uses it.

use std::{
    fs, io,
    net::{Shutdown, SocketAddr, TcpListener},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::common::browser::Browser;
use crate::common::http::Client;
use crate::common::{
    self, Daemon, Port, Ports,
    client::{Load, turns},
    command, eventually, kill_hard, named, other_address,
};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const TOKEN: &str = "s3cret-t0ken";
/// How soon what happens has to be seen.
const SOON: Duration = Duration::from_secs(2);
const ENTER: char = '\u{e007}';
const ESCAPE: char = '\u{e00c}';
/// Everything is in rotation, and the page knows.
const ALL_HEALTHY: &str = "document.querySelectorAll('.worker[data-state=healthy]').length === 4";

/// A folder with the token in it.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    fs::write(&token, TOKEN).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    folder
}

/// `[admin]` on this address, with the token.
fn admin(address: SocketAddr) -> String {
    format!("[admin]\nsocket = \"a.sock\"\nlisten = \"{address}\"\ntoken-file = \"token\"\n")
}

fn local(port: &Port) -> SocketAddr {
    ([127, 0, 0, 1], port.number).into()
}

/// Four healthy workers, and the dashboard on `address`.
fn start(ports: &Ports, address: SocketAddr) -> Daemon {
    let config = format!("{}{}", admin(address), ports.service(&command(&["http"])));
    let daemon = Daemon::start_in(folder(), &config);
    daemon.wait_healthy(common::Mark::START, 4);
    daemon
}

/// The card of a worker of `web`, in JavaScript.
fn card(slot: usize) -> String {
    format!("document.querySelector('[data-worker=\"web/{slot}\"]')")
}

fn button(slot: usize, part: &str) -> String {
    format!("[data-worker=\"web/{slot}\"] [data-part={part}]")
}

/// Gives the token where the open dialog asks for one, confirms it, and waits until it is closed.
fn confirm(browser: &Browser) {
    if browser.run("return !document.querySelector('#ask-token').hidden") == true {
        browser.fill("#token", TOKEN);
    }
    browser.click("#ask-yes");
    browser.until("!document.querySelector('dialog').open");
}

/// The ports that take the next twelve connections.
fn takers(ports: &Ports) -> Vec<u16> {
    let mut taken = turns(ports.address(), 12);
    taken.sort_unstable();
    taken.dedup();
    taken
}

fn sorted(mut ports: Vec<u16>) -> Vec<u16> {
    ports.sort_unstable();
    ports
}

#[test]
fn what_nobody_counts_is_not_shown_as_none() {
    let Some(browser) = Browser::start() else { return };
    let (ports, port) = (Ports::take(4), Port::take());
    let service = ports.service(&format!("{}\nroute = \"direct\"", command(&["http"])));
    let daemon = Daemon::start_in(folder(), &(admin(local(&port)) + &service));
    daemon.wait_healthy(common::Mark::START, 4);
    turns(ports.address(), 12);
    browser.open(&format!("http://{}/", local(&port)));
    browser.until(ALL_HEALTHY);
    for slot in 0..4 {
        let bytes = format!("[data-worker=\"web/{slot}\"] [data-part=bytes]");
        assert_eq!(browser.text(&bytes), "–");
    }
    for part in ["out", "in"] {
        assert_eq!(browser.text(&format!("[data-part={part}]")), "–");
    }
}

#[test]
fn the_workers_are_there_and_a_killed_one_is_seen_soon() {
    let Some(browser) = Browser::start() else { return };
    let (ports, port) = (Ports::take(4), Port::take());
    let daemon = start(&ports, local(&port));
    browser.open(&format!("http://{}/", local(&port)));
    browser.until(ALL_HEALTHY);
    assert_eq!(browser.text("h1"), "All 4 workers in rotation");
    let pids = daemon.slot_pids();
    for (slot, pid) in pids.iter().enumerate() {
        let text = browser.text(&format!("[data-worker=\"web/{slot}\"]"));
        for part in [&format!("web/{slot}"), "healthy", &format!("pid {pid}")] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.contains(&format!(":{}", ports.worker(slot))), "{text}");
    }
    browser.until("document.querySelector('#log').innerText.includes('worker healthy')");
    // Traffic becomes a line.
    let load = Load::start(ports.address(), "/");
    browser.until(&format!("parseInt({}.querySelector('figure b').textContent) > 0", card(0)));
    browser.until(&format!(
        "/L[\\d.]+ (?!19.50)/.test({}.querySelector('path + path').getAttribute('d'))",
        card(0)
    ));
    load.end_without_failure();

    kill_hard(pids[2]);
    let began = Instant::now();
    browser.until(&format!("{}.textContent.includes('killed by SIGKILL')", card(2)));
    let told = "document.querySelector('#log').innerText";
    browser.until(&format!("/worker exited\\s+web\\/2\\s+pid={}/.test({told})", pids[2]));
    let seen = began.elapsed();
    assert!(seen < SOON, "{seen:?}");
    browser.until(ALL_HEALTHY);
    let now = daemon.slot_pids()[2];
    assert_ne!(now, pids[2]);
    browser.until(&format!("{}.textContent.includes('pid {now}')", card(2)));
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn its_buttons_drain_resume_and_restart() {
    let Some(browser) = Browser::start() else { return };
    let (ports, port) = (Ports::take(4), Port::take());
    let daemon = start(&ports, local(&port));
    let pids = daemon.slot_pids();
    browser.open(&format!("http://{}/", local(&port)));
    browser.until(ALL_HEALTHY);
    assert_eq!(takers(&ports), sorted(ports.all()));

    // Not without a confirmation, nor with the wrong token.
    browser.click(&button(1, "place"));
    browser.until("document.querySelector('dialog').open");
    assert_eq!(browser.text("dialog h2"), "Drain web/1?");
    browser.press(ESCAPE);
    browser.until("!document.querySelector('dialog').open");
    browser.click(&button(1, "place"));
    browser.fill("#token", "wrong");
    browser.click("#ask-yes");
    browser.until("document.querySelector('#ask-error').textContent");
    assert_eq!(
        browser.text("#ask-error"),
        "lbd does not take this token: it is not the one in the file that [admin] token-file names."
    );
    let complaints = browser.console();
    assert!(complaints.len() == 1 && complaints[0].contains("status of 401"), "{complaints:?}");
    assert_eq!(takers(&ports), sorted(ports.all()));
    confirm(&browser);
    browser.until(&format!("{}.dataset.state === 'draining'", card(1)));
    assert!(!takers(&ports).contains(&ports.worker(1)));
    assert_eq!(browser.text("h1"), "3 of 4 workers in rotation");

    // Back again, by keys alone, and the token is known.
    browser
        .until(&format!("{}.querySelector('[data-part=place]').textContent === 'Resume'", card(1)));
    browser.run(&format!("{}.querySelector('[data-part=place]').focus()", card(1)));
    browser.press(ENTER);
    browser.until("document.querySelector('dialog').open");
    assert_eq!(browser.run("return document.querySelector('#ask-token').hidden"), true);
    browser.press(ENTER);
    browser.until(&format!("{}.dataset.state === 'healthy'", card(1)));
    browser.until("!document.querySelector('dialog').open");
    assert_eq!(takers(&ports), sorted(ports.all()));
    assert_eq!(daemon.slot_pids(), pids);

    // What was said is put away, as it may be in the way.
    while browser.run("return document.querySelector('#toasts button') !== null") == true {
        browser.click("#toasts button");
    }
    // One worker, which a cancelled question leaves alone.
    browser.click(&button(3, "restart"));
    browser.click("#ask-no");
    browser.until("!document.querySelector('dialog').open");
    assert_eq!(daemon.slot_pids(), pids);
    browser.click(&button(3, "restart"));
    confirm(&browser);
    eventually("it is replaced", || daemon.slot_pids()[3] != pids[3]);
    let pid = daemon.slot_pids()[3];
    browser.until(&format!("{}.textContent.includes('pid {pid}')", card(3)));
    assert_eq!(daemon.slot_pids()[..3], pids[..3]);

    // All of them.
    browser.click("[data-service=web] header [data-part=restart]");
    confirm(&browser);
    let toasts = "document.querySelector('#toasts').textContent";
    browser.until(&format!("{toasts}.includes('web: 4 workers replaced.')"));
    assert!(daemon.slot_pids().iter().all(|pid| !pids.contains(pid)));
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn a_refused_reload_says_why() {
    let Some(browser) = Browser::start() else { return };
    let (ports, port) = (Ports::take(4), Port::take());
    let daemon = start(&ports, local(&port));
    browser.open(&format!("http://{}/", local(&port)));
    browser.until(ALL_HEALTHY);
    let good = fs::read_to_string(daemon.path("lb.toml")).unwrap();
    daemon.write_config(&good.replace("ports =", "prots ="));
    browser.click("#reload");
    browser.fill("#token", TOKEN);
    browser.click("#ask-yes");
    browser.until("document.querySelector('#ask-error').textContent");
    let error = browser.text("#ask-error");
    assert!(error.contains("lb.toml:") && error.contains("prots"), "{error}");
    browser.click("#ask-no");
    browser.until("document.querySelector('#refused').innerText.includes('prots')");
    daemon.write_config(&good);
    browser.click("#reload");
    confirm(&browser);
    browser.until("document.querySelector('#refused').hidden");
    let done = "Reloaded: services added 0, removed 0, changed 0.";
    browser.until(&format!("document.querySelector('#toasts').textContent.includes('{done}')"));
}

#[test]
fn it_says_when_the_daemon_is_away_and_what_it_says_is_only_text() {
    let Some(browser) = Browser::start() else { return };
    let (ports, jobs, port) = (Ports::take(1), Ports::take(1), Port::take());
    // No token: to look only. And an error that would be markup.
    let evil = "command = [\"/<img src=x onerror=document.title='evil'>\"]";
    let config = format!(
        "[admin]\nlisten = \"{}\"\n{}{}",
        local(&port),
        ports.service(&command(&["http"])),
        named("jobs", &jobs.service(evil)),
    );
    let mut daemon = Daemon::healthy(&config, 1);
    browser.open(&format!("http://{}/", local(&port)));
    browser.until("document.querySelector('[data-worker=\"jobs/0\"]').dataset.state === 'backoff'");
    let trouble = browser.text("[data-worker=\"jobs/0\"] .trouble");
    assert!(trouble.contains("<img src=x onerror="), "{trouble}");
    browser.until("document.querySelector('#log').innerText.includes('<img src=x')");
    assert_eq!(browser.run("return document.images.length"), 0);
    assert_eq!(browser.run("return document.title"), "1/2 · lbd");
    assert_eq!(browser.text("h1"), "No worker of jobs is in rotation");
    let disabled = "[...document.querySelectorAll('.act')].every((button) => button.disabled)";
    assert_eq!(browser.run(&format!("return {disabled}")), true);
    assert_eq!(
        browser.text("#looking"),
        "Look only: over TCP nothing can be changed without a token, and [admin] token-file is not set."
    );
    assert_eq!(browser.console(), [""; 0]);

    daemon.signal(Signal::SIGTERM);
    daemon.wait_stopped();
    browser.until("document.body.dataset.link === 'away'");
    browser.until("/trying again/.test(document.querySelector('#away').innerText)");
    assert_eq!(browser.text("h1"), "lbd is away");
    assert_eq!(browser.run(&format!("return {disabled}")), true);
    let daemon = Daemon::healthy(&config, 1);
    browser.until("document.body.dataset.link === 'live'");
    let pid = daemon.slot_pids()[0];
    browser.until(&format!("{}.textContent.includes('pid {pid}')", card(0)));
    assert_eq!(browser.run("return document.querySelector('#away').hidden"), true);
    browser.until("document.querySelector('h1').innerText === 'No worker of jobs is in rotation'");
}

#[test]
fn from_another_machine_it_wants_the_token_first() {
    let Some(ip) = other_address() else { return }; // there is no other address to come from
    let Some(browser) = Browser::start() else { return };
    let (ports, port) = (Ports::take(4), Port::take());
    let far = SocketAddr::new(ip, port.number);
    let _daemon = start(&ports, ([0, 0, 0, 0], port.number).into());
    browser.open(&format!("http://{far}/"));
    browser.until("document.querySelector('dialog').open");
    browser.fill("#token", "wrong");
    browser.press(ENTER);
    browser
        .until("/does not take this token/.test(document.querySelector('#ask-error').innerText)");
    assert_eq!(browser.run("return document.querySelectorAll('.worker').length"), 0);
    confirm(&browser);
    browser.until(ALL_HEALTHY);
    // It is known to the buttons too, until it is forgotten.
    browser.click("#reload");
    assert_eq!(browser.run("return document.querySelector('#ask-token').hidden"), true);
    browser.click("#ask-no");
    browser.click("#forget");
    browser.click("#reload");
    assert_eq!(browser.run("return document.querySelector('#ask-token').hidden"), false);
}

/// What `ssh -L PORT:SOCKET` does: whoever connects is connected to the unix socket.
fn forward(socket: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Until the test ends.
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut daemon) = (client.unwrap(), UnixStream::connect(&socket).unwrap());
            let (mut from, mut to) = (client.try_clone().unwrap(), daemon.try_clone().unwrap());
            thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            thread::spawn(move || {
                let _ = io::copy(&mut daemon, &mut client);
                let _ = client.shutdown(Shutdown::Both);
            });
        }
    });
    address
}

#[test]
fn through_a_forwarded_port_to_the_socket_no_token_is_needed() {
    let Some(browser) = Browser::start() else { return };
    let ports = Ports::take(4);
    let admin = "[admin]\nsocket = \"a.sock\"\n";
    let daemon = Daemon::healthy(&format!("{admin}{}", ports.service(&command(&["http"]))), 4);
    let address = forward(daemon.path("a.sock"));
    browser.open(&format!("http://localhost:{}/", address.port()));
    browser.until(ALL_HEALTHY);
    browser.click(&button(2, "place"));
    assert_eq!(browser.run("return document.querySelector('#ask-token').hidden"), true);
    confirm(&browser);
    browser.until(&format!("{}.dataset.state === 'draining'", card(2)));
    assert!(!takers(&ports).contains(&ports.worker(2)));
    assert_eq!(browser.console(), [""; 0]);
}

/// Whatever is text has the contrast that WCAG 2 asks for at level AA: what lacks it.
const PALE: &str = r"
const parse = (colour) => {
  const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
  return { r, g, b, a };
};
const over = (top, below) => {
  const mix = (x, y) => x * top.a + y * (1 - top.a);
  return { r: mix(top.r, below.r), g: mix(top.g, below.g), b: mix(top.b, below.b), a: 1 };
};
const ground = (element) => {
  if (element === null) return { r: 255, g: 255, b: 255, a: 1 };
  const own = parse(getComputedStyle(element).backgroundColor);
  return own.a === 1 ? own : over(own, ground(element.parentElement));
};
const light = ({ r, g, b }) => {
  const line = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * line(r) + 0.7152 * line(g) + 0.0722 * line(b);
};
const pale = new Set();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('script, style')) continue;
  const below = ground(element);
  const [a, b] = [light(over(parse(getComputedStyle(element).color), below)), light(below)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) pale.add(`${ratio.toFixed(2)} ${element.className} ${walker.currentNode.data.trim()}`);
}
return [...pale];
";

#[test]
fn it_fits_a_phone_and_is_legible_in_both_themes() {
    let Some(browser) = Browser::start() else { return };
    let (ports, jobs, port) = (Ports::take(4), Ports::take(1), Port::take());
    let health = "health.http = \"/health\"\nhealth.interval = \"50ms\"";
    let web = ports.service(&format!("{}\n{health}", command(&["http", "--status", "{slot}"])));
    let failing = named("jobs", &jobs.service(&command(&["exit", "3"])));
    let config = format!("{}{web}{failing}", admin(local(&port)));
    let daemon = Daemon::start_in(folder(), &config);
    daemon.wait_healthy(common::Mark::START, 4);
    // One of each kind.
    fs::write(daemon.path("1"), "500").unwrap();
    assert!(daemon.lbd(&["drain", "web", "2"]).status.success());
    let load = Load::start(ports.address(), "/bytes/1000");
    browser.resize(1280, 800);
    browser.open(&format!("http://{}/", local(&port)));
    for (worker, state) in
        [("web/0", "healthy"), ("web/1", "unhealthy"), ("web/2", "draining"), ("jobs/0", "backoff")]
    {
        let card = format!("document.querySelector('[data-worker=\"{worker}\"]')");
        browser.until(&format!("{card}.dataset.state === '{state}'"));
        let shown = format!("{card}.querySelector('[data-part=state]').innerText");
        browser.until(&format!("{shown} === '{state}'"));
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for scheme in ["light", "dark"] {
        browser.prefer(scheme);
        for width in [400, 1280, 1920] {
            browser.resize(width, 800);
            let inside = browser.run(
                "await new Promise(requestAnimationFrame);
                 return [document.documentElement.scrollWidth, innerWidth]",
            );
            assert_eq!(inside, serde_json::json!([width, width]), "{scheme}");
            browser.picture(&folder.join(format!("dashboard-{scheme}-{width}.png")));
        }
        assert_eq!(browser.run(PALE), serde_json::json!([]), "{scheme}");
        browser.click(&button(0, "place"));
        browser.until("document.querySelector('dialog').open");
        assert_eq!(browser.run(PALE), serde_json::json!([]), "{scheme}");
        browser.click("#ask-no");
    }
    let page = browser.run("return getComputedStyle(document.body).backgroundColor");
    assert_eq!(page, "rgb(16, 19, 18)", "it is dark");
    assert_eq!(browser.console(), [""; 0]);
    load.end_without_failure();
}

#[test]
fn the_page_is_sealed() {
    let (ports, port) = (Ports::take(4), Port::take());
    let _daemon = start(&ports, local(&port));
    let get = |path: &str| {
        let mut client = Client::connect(local(&port));
        client.send(format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", local(&port)));
        client.answer()
    };
    let page = get("/");
    let header = |name: &str| page.header(name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!((page.status, header("content-type")), (200, "text/html; charset=utf-8"));
    assert_eq!((header("x-frame-options"), header("cache-control")), ("DENY", "no-store"));
    assert_eq!(header("referrer-policy"), "no-referrer");
    let policy = header("content-security-policy");
    for rule in [
        "default-src 'none'",
        "script-src 'nonce-",
        "style-src 'nonce-",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(policy.contains(rule), "{rule}: {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    for path in ["/", "/status", "/metrics", "/nothing"] {
        let answer = get(path);
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(answer.header("cross-origin-resource-policy"), Some("same-origin"), "{path}");
    }
}
