//! A Chromium of one's own, driven over WebDriver (W3C): plain HTTP and JSON to `chromedriver`.

use std::{
    fs,
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    PATIENCE, Port,
    http::{Answer, Client},
};

/// Set where Chromium has to be there, as in `.ci/run`.
const REQUIRED: &str = "LBD_REQUIRE_CHROMIUM";
/// It asks nobody, and fetches nothing but what it is told to.
const FLAGS: [&str; 10] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
];
/// What an element is known by in JSON (WebDriver, 12.1).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one window and a profile that nobody had before. Dropped, it is gone.
pub(crate) struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
    profile: TempDir,
    _port: Port,
}

impl Browser {
    /// `None` where there is no Chromium, which is then said.
    pub(crate) fn start() -> Option<Self> {
        // Not one of the kernel's choice: it takes the same one of IPv6 and of IPv4.
        let port = Port::take();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={}", port.number))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut driver = match driver {
            Ok(driver) => driver,
            Err(error) => return missing(&format!("no chromedriver: {error}")),
        };
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let started = |line: io::Result<String>| line.unwrap().contains("started successfully");
        assert!(lines.any(started), "chromedriver does not start");
        let profile = tempfile::tempdir().unwrap();
        let flags = FLAGS.iter().map(|flag| (*flag).to_owned());
        let folder = format!("--user-data-dir={}", profile.path().display());
        let mut browser =
            Self { driver, address: port.address(), session: String::new(), profile, _port: port };
        let capabilities = json!({
            "goog:chromeOptions": { "args": flags.chain([folder]).collect::<Vec<_>>() },
            "goog:loggingPrefs": { "browser": "ALL" },
        });
        let new = json!({ "capabilities": { "alwaysMatch": capabilities } });
        match browser.call("POST", "/session", &new) {
            Ok(session) => browser.session = session["sessionId"].as_str().unwrap().to_owned(),
            Err(error) => return missing(&format!("chromium does not start: {error}")),
        }
        Some(browser)
    }

    /// Opens this page.
    pub(crate) fn open(&self, url: &str) {
        self.command("/url", &json!({ "url": url }));
    }

    /// What this function body returns.
    pub(crate) fn run(&self, script: &str) -> Value {
        self.command("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until this expression is true; while it is about what is not there, it is not.
    pub(crate) fn until(&self, expression: &str) {
        let began = Instant::now();
        let script = format!("try {{ return Boolean({expression}) }} catch {{ return false }}");
        while self.run(&script) != true {
            if began.elapsed() > PATIENCE {
                let page = self.run("return document.body.innerText");
                panic!("not in time: {expression}\n{}", page.as_str().unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The text of an element as one sees it.
    pub(crate) fn text(&self, selector: &str) -> String {
        let text = self.run(&format!("return document.querySelector({selector:?}).innerText"));
        text.as_str().unwrap().to_owned()
    }

    /// Clicks as a mouse does: on what is there, scrolled into view, and not covered.
    pub(crate) fn click(&self, selector: &str) {
        let center = "scrollIntoView({ block: 'center' })";
        self.run(&format!("document.querySelector({selector:?}).{center}"));
        self.command(&format!("/element/{}/click", self.element(selector)), &json!({}));
    }

    /// Types into a field.
    pub(crate) fn fill(&self, selector: &str, text: &str) {
        self.command(&format!("/element/{}/clear", self.element(selector)), &json!({}));
        let text = json!({ "text": text });
        self.command(&format!("/element/{}/value", self.element(selector)), &text);
    }

    /// Presses a key, wherever the focus is.
    pub(crate) fn press(&self, key: char) {
        let key = |kind: &str| json!({ "type": kind, "value": key });
        let keys =
            json!({ "type": "key", "id": "keys", "actions": [key("keyDown"), key("keyUp")] });
        self.command("/actions", &json!({ "actions": [keys] }));
    }

    /// The size of the window's inside, in CSS pixels.
    pub(crate) fn resize(&self, width: u32, height: u32) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.devtools("Emulation.setDeviceMetricsOverride", &size);
    }

    /// What the user prefers: `light` or `dark`.
    pub(crate) fn prefer(&self, scheme: &str) {
        let features = [json!({ "name": "prefers-color-scheme", "value": scheme })];
        self.devtools("Emulation.setEmulatedMedia", &json!({ "features": features }));
    }

    /// Writes what is seen to a PNG file.
    pub(crate) fn picture(&self, file: &Path) {
        let picture = self.get("/screenshot");
        fs::write(file, base64(picture.as_str().unwrap())).unwrap();
    }

    /// What the console says since the last time.
    pub(crate) fn console(&self) -> Vec<String> {
        let lines = self.command("/se/log", &json!({ "type": "browser" }));
        let text = |line: &Value| format!("{} {}", line["level"], line["message"]);
        lines.as_array().unwrap().iter().map(text).collect()
    }

    fn element(&self, selector: &str) -> String {
        let how = json!({ "using": "css selector", "value": selector });
        self.command("/element", &how)[ELEMENT].as_str().unwrap().to_owned()
    }

    fn devtools(&self, command: &str, parameters: &Value) {
        self.command("/goog/cdp/execute", &json!({ "cmd": command, "params": parameters }));
    }

    fn command(&self, path: &str, body: &Value) -> Value {
        let path = format!("/session/{}{path}", self.session);
        self.call("POST", &path, body).unwrap_or_else(|error| panic!("{path} {body}: {error}"))
    }

    fn get(&self, path: &str) -> Value {
        self.call("GET", &format!("/session/{}{path}", self.session), &Value::Null).unwrap()
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (host, length) = (self.address, body.len());
        let mut client = Client::connect(self.address);
        client.send(format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        ));
        let Answer { status, body, .. } = client.answer();
        let mut answer: Value = serde_json::from_slice(&body).unwrap();
        match status {
            200 => Ok(answer["value"].take()),
            _ => Err(answer["value"]["message"].as_str().unwrap_or_default().to_owned()),
        }
    }

    /// The processes of this browser, known by their profile.
    fn processes(&self) -> Vec<Pid> {
        let profile = self.profile.path().to_str().unwrap();
        let entries = fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let ours = |pid: &i32| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(profile))
        };
        pids.filter(ours).map(Pid::from_raw).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() && !thread::panicking() {
            let _ = self.call("DELETE", &format!("/session/{}", self.session), &Value::Null);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        let until = Instant::now() + PATIENCE;
        loop {
            let left = self.processes();
            if left.is_empty() || Instant::now() > until {
                break;
            }
            for pid in left {
                let _ = kill(pid, Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Says that there is nothing to test with, where that is allowed.
fn missing(why: &str) -> Option<Browser> {
    let required = std::env::var_os(REQUIRED).is_some();
    assert!(!required, "{why} (Debian: chromium, chromium-driver)");
    eprintln!("NOT TESTED: {why} (Debian: chromium, chromium-driver)");
    None
}

/// Decodes base64 (RFC 4648).
fn base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("no base64: {other}"),
    };
    let digits: Vec<u8> = text.trim_end_matches('=').bytes().map(value).collect();
    let group = |group: &[u8]| {
        let bits = group.iter().fold(0_u32, |bits, digit| bits << 6 | u32::from(*digit));
        let bits = bits << (6 * (4 - group.len()));
        bits.to_be_bytes()[1..group.len()].to_vec()
    };
    digits.chunks(4).flat_map(group).collect()
}
