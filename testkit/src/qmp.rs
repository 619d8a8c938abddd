//! QEMU's control protocol (QMP): one command at a time over a Unix socket.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long an answer may take. Longer than any command that is used here.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection.
pub struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
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
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
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
