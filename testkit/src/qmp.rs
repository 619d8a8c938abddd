//! QEMU's control protocol (QMP): one command at a time over a Unix socket, and the times at which
//! the VM stood still and went on.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long an answer may take. Longer than any command that is used here.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection.
pub struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
    /// When the VM was stopped last, and when it went on last, by QEMU's clock.
    stopped: Option<SystemTime>,
    resumed: Option<SystemTime>,
}

impl Qmp {
    /// Takes a connection and leaves the negotiation behind.
    ///
    /// # Errors
    /// Whoever is at the other end is no QEMU.
    pub fn start(output: UnixStream) -> Result<Self> {
        output.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut qmp = Self {
            input: BufReader::new(output.try_clone()?),
            output,
            stopped: None,
            resumed: None,
        };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            bail!("not QEMU's greeting: {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Errors
    /// QEMU refuses (the message says why), or is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.output, "{request}").with_context(|| format!("ask QEMU to {command}"))?;
        loop {
            let mut answer = self
                .receive()
                .with_context(|| format!("QEMU's answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            // Anything else is an event, which nobody here waits for: states are asked for.
            self.note_event(&answer);
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// When the VM was stopped last, as far as its event came before the last answer.
    pub fn stopped_at(&self) -> Option<SystemTime> {
        self.stopped
    }

    /// When the VM began to run last, likewise.
    pub fn resumed_at(&self) -> Option<SystemTime> {
        self.resumed
    }

    fn note_event(&mut self, event: &Value) {
        let part = |name: &str| event["timestamp"][name].as_u64();
        let (Some(seconds), Some(micros)) = (part("seconds"), part("microseconds")) else {
            return;
        };
        let at = UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(micros);
        match event["event"].as_str() {
            Some("STOP") => self.stopped = Some(at),
            Some("RESUME") => self.resumed = Some(at),
            _ => {}
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.input.read_line(&mut line)? == 0 {
            bail!("QEMU has closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
