//! A real browser, driven through chromedriver.
//!
//! The part of W3C WebDriver that one test needs is six requests of JSON. The client libraries for
//! it bring a TLS stack, or a licence or a crate that deny.toml keeps out.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::http;

/// Names of the browser, best first.
const BROWSERS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "chrome"];

/// Browser and driver, if both are installed.
pub(crate) fn installed() -> Option<(PathBuf, PathBuf)> {
    let find = |name: &str| {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .map(|dir| dir.join(name))
            .find(|file| file.is_file())
    };
    let browser = BROWSERS.into_iter().find_map(find)?;
    Some((browser, find("chromedriver")?))
}

/// The colours that a user prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Light,
    Dark,
}

impl Scheme {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Light => "light",
            Self::Dark => "dark",
        }
    }
}

/// A browser with one empty window.
pub(crate) struct Browser {
    driver: Child,
    authority: String,
    session: String,
    _profile: tempfile::TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The end of the session ends the browser; a driver that is killed leaves it behind.
        let _ = self.end_session();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Browser {
    /// Starts a browser without a profile, a network of its own or a screen.
    pub(crate) async fn start((browser, driver): (PathBuf, PathBuf)) -> Self {
        let profile = tempfile::tempdir().unwrap();
        let mut driver = Command::new(driver)
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines
            .map_while(Result::ok)
            .find_map(|line| {
                let (_, port) = line.split_once("started successfully on port ")?;
                port.trim_end_matches('.').parse::<u16>().ok()
            })
            .expect("chromedriver says its port");
        let mut browser_options = json!({
            "binary": browser,
            "args": [
                "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1440,1200",
            ],
        });
        let user_data = format!("--user-data-dir={}", profile.path().display());
        browser_options["args"]
            .as_array_mut()
            .unwrap()
            .push(user_data.into());
        let mut this = Self {
            driver,
            authority: format!("127.0.0.1:{port}"),
            session: String::new(),
            _profile: profile,
        };
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": browser_options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let session = this.post("/session", &wanted).await;
        this.session = session["sessionId"].as_str().unwrap().to_owned();
        this
    }

    /// Without a runtime, since a test that failed ends here too.
    fn end_session(&self) -> std::io::Result<()> {
        let mut stream = TcpStream::connect(&self.authority)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let (authority, session) = (&self.authority, &self.session);
        write!(
            stream,
            "DELETE /session/{session} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n"
        )?;
        // The answer comes when the browser is gone.
        stream.read_exact(&mut [0; 12])
    }

    async fn post(&self, path: &str, body: &Value) -> Value {
        let answer = http::post(&self.authority, path, body).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()["value"].take()
    }

    async fn command(&self, name: &str, body: &Value) -> Value {
        self.post(&format!("/session/{}/{name}", self.session), body)
            .await
    }

    /// Opens a page.
    pub(crate) async fn open(&self, url: &str) {
        self.command("url", &json!({"url": url})).await;
    }

    /// Prefers light or dark pages, as a user's settings do.
    pub(crate) async fn prefer(&self, scheme: Scheme) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme.name()}]);
        self.devtools("Emulation.setEmulatedMedia", json!({"features": features}))
            .await;
    }

    /// Makes the window as large as this.
    pub(crate) async fn resize(&self, width: u32, height: u32) {
        let size = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false,
        });
        self.devtools("Emulation.setDeviceMetricsOverride", size)
            .await;
    }

    async fn devtools(&self, name: &str, params: Value) -> Value {
        self.command("goog/cdp/execute", &json!({"cmd": name, "params": params}))
            .await
    }

    /// Runs a script in the page; `return` gives a value back.
    pub(crate) async fn run(&self, script: &str) -> Value {
        self.command("execute/sync", &json!({"script": script, "args": []}))
            .await
    }

    /// Waits until an expression in the page is true. Looked at after every frame and every answer
    /// that the page gets.
    pub(crate) async fn until(&self, condition: &str) {
        let script = format!(
            "const done = arguments[arguments.length - 1];
             const end = Date.now() + 20000;
             (function look() {{
               let there = false;
               try {{ there = Boolean({condition}); }} catch {{ /* not yet */ }}
               if (there || Date.now() > end) done(there);
               else requestAnimationFrame(look);
             }})();"
        );
        let there = self
            .command("execute/async", &json!({"script": script, "args": []}))
            .await;
        if there != true {
            let text = self.run("return document.body.innerText").await;
            panic!(
                "{condition} did not come true:\n{}",
                text.as_str().unwrap_or_default()
            );
        }
    }

    /// Presses a key in the element that has the focus.
    pub(crate) async fn press(&self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            let params = json!({"type": kind, "key": key, "code": key});
            self.devtools("Input.dispatchKeyEvent", params).await;
        }
    }

    /// What the page wrote to its console, refusals of its own policy among it.
    pub(crate) async fn console(&self) -> Vec<Value> {
        let log = self.command("se/log", &json!({"type": "browser"})).await;
        log.as_array().unwrap().clone()
    }

    /// The whole page as a PNG.
    pub(crate) async fn screenshot(&self, file: &Path) {
        let shot = self
            .devtools(
                "Page.captureScreenshot",
                json!({"captureBeyondViewport": true}),
            )
            .await;
        let png = base64(shot["data"].as_str().unwrap());
        assert!(png.starts_with(b"\x89PNG"));
        std::fs::write(file, png).unwrap();
    }
}

/// Decodes standard base64.
fn base64(text: &str) -> Vec<u8> {
    let (mut bytes, mut word, mut bits) = (Vec::with_capacity(text.len() / 4 * 3), 0_u32, 0);
    for digit in text.bytes().take_while(|digit| *digit != b'=') {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        word = word << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits & 0xFF) as u8);
        }
    }
    bytes
}
