//! NBD servers: `hikkoshi serve`, and the peers that can be its source.

use crate::cache;
use crate::netns::Namespace;
use crate::process::{self, Process};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long a server may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// A running server of one default export on TCP. Killed when dropped.
pub struct Server {
    process: Process,
    address: SocketAddrV4,
}

impl Server {
    /// `qemu-nbd` serving the raw image.
    ///
    /// # Errors
    /// It does not start, or does not listen in time; the message has what it said.
    pub fn qemu_nbd(site: &Namespace, image: &Path, address: SocketAddrV4) -> Result<Self> {
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        let image_argument = image.display().to_string();
        let arguments = [
            "--format=raw",
            "--persistent",
            "--shared=16",
            "--cache=none",
            "--bind",
            &host,
            "--port",
            &port,
            &image_argument,
        ];
        Self::start(site, "qemu-nbd", &arguments, address, &log_of(image))
    }

    /// `nbdkit` with its file plugin serving the raw image.
    ///
    /// # Errors
    /// As [`Server::qemu_nbd`].
    pub fn nbdkit(site: &Namespace, image: &Path, address: SocketAddrV4) -> Result<Self> {
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        let file = format!("file={}", image.display());
        let arguments = [
            "--foreground",
            "--ipaddr",
            &host,
            "--port",
            &port,
            "file",
            &file,
        ];
        Self::start(site, "nbdkit", &arguments, address, &log_of(image))
    }

    fn start(
        site: &Namespace,
        program: &str,
        arguments: &[&str],
        address: SocketAddrV4,
        log: &Path,
    ) -> Result<Self> {
        let mut process = Process::start(Some(site), program, arguments, log)?;
        process.wait_until("listening socket", START_TIMEOUT, |process| {
            process::listens_on(process.pid(), address.port())
        })?;
        Ok(Self { process, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// Its address as an NBD URI.
    pub fn uri(&self) -> String {
        format!("nbd://{}", self.address)
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(self) -> Result<()> {
        self.process.kill()
    }
}

fn log_of(image: &Path) -> PathBuf {
    image.with_extension("server.log")
}

/// A running `hikkoshi serve` with one default export. Killed when dropped.
pub struct Hikkoshi {
    server: Server,
    binary: PathBuf,
    control: String,
}

impl Hikkoshi {
    /// Serves `image` at `address` of `site`; with `from`, as the destination of that source. Its
    /// log, and its control socket, are beside the image. `extra` goes to the command line.
    ///
    /// # Errors
    /// The program does not build, does not start, or does not listen in time.
    pub fn serve(
        site: &Namespace,
        image: &Path,
        address: SocketAddrV4,
        from: Option<&str>,
        extra: &[&str],
    ) -> Result<Self> {
        Self::serve_and_log(site, image, address, (from, extra), None)
    }

    /// The same with a log of its own choice, in the words of `RUST_LOG`.
    ///
    /// # Errors
    /// As [`Hikkoshi::serve`].
    pub fn serve_and_log(
        site: &Namespace,
        image: &Path,
        address: SocketAddrV4,
        (from, extra): (Option<&str>, &[&str]),
        filter: Option<&str>,
    ) -> Result<Self> {
        let binary = cache::hikkoshi()?;
        let control = format!("unix:{}", image.with_extension("control").display());
        let listen = format!("tcp://{address}");
        let image_argument = image.display().to_string();
        let mut arguments = vec![
            "serve",
            &image_argument,
            "--listen",
            &listen,
            "--control",
            &control,
        ];
        if let Some(from) = from {
            arguments.extend(["--from", from]);
        }
        arguments.extend(extra);
        let program = binary.display().to_string();
        let filter = filter.map(|filter| format!("RUST_LOG={filter}"));
        let program = match &filter {
            None => program.as_str(),
            // `env` replaces itself by the program.
            Some(filter) => {
                arguments.splice(0..0, [filter.as_str(), &program]);
                "env"
            }
        };
        let server = Server::start(site, program, &arguments, address, &log_of(image))?;
        Ok(Self {
            server,
            binary,
            control,
        })
    }

    /// Runs another of `hikkoshi`'s commands against this daemon and returns its output.
    ///
    /// # Errors
    /// Its status is not 0; the message has what it said, and the daemon's log.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.binary);
        command.args(arguments).args(["--control", &self.control]);
        process::output(&mut command).with_context(|| format!("daemon: {}", self.tail()))
    }

    /// What `status --json` says of the export.
    ///
    /// # Errors
    /// The command fails, or its output is not that.
    pub fn status(&self) -> Result<Status> {
        let text = self.command(&["status", "--json"])?;
        let value: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        // One export, or a list of all of them.
        let export = match &value {
            Value::Array(list) => list.first(),
            Value::Object(fields) if fields.contains_key("exports") => fields["exports"].get(0),
            other => Some(other),
        };
        let export = export.with_context(|| format!("no export in {text}"))?;
        Ok(Status(export.clone()))
    }

    /// Waits until every block is here, by `hikkoshi wait --for resident`.
    ///
    /// # Errors
    /// It is not so within `timeout`, or the state says otherwise afterwards.
    pub fn wait_resident(&self, timeout: Duration) -> Result<Status> {
        let limit = format!("{}s", timeout.as_secs());
        self.command(&["wait", "--for", "resident", "--timeout", &limit])?;
        let status = self.status()?;
        ensure!(
            status.number("absent_bytes")? == 0,
            "resident with blocks absent: {status:?}"
        );
        ensure!(
            status.number("resident_bytes")? == status.number("size_bytes")?,
            "resident with blocks missing: {status:?}"
        );
        Ok(status)
    }

    /// Waits until the status has `state`.
    ///
    /// # Errors
    /// It has not within `timeout`.
    pub fn wait_state(&self, state: &str, timeout: Duration) -> Result<Status> {
        let start = Instant::now();
        loop {
            let status = self.status()?;
            if status.state()? == state {
                return Ok(status);
            }
            if start.elapsed() > timeout {
                bail!(
                    "not {state} within {timeout:?}: {status:?}\n{}",
                    self.tail()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// Where it is controlled, as `--control` takes it.
    pub fn control(&self) -> &str {
        &self.control
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddrV4 {
        self.server.address()
    }

    /// Its address as an NBD URI.
    pub fn uri(&self) -> String {
        self.server.uri()
    }

    /// All of its log.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn log(&self) -> Result<String> {
        self.server.process.log()
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        self.server.process.tail()
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(self) -> Result<()> {
        self.server.kill()
    }
}

/// One export's status, as `status --json` has it.
#[derive(Clone, Debug)]
pub struct Status(pub Value);

impl Status {
    /// Where the volume stands: `local`, `standby`, `arriving`.
    ///
    /// # Errors
    /// The field is not there.
    pub fn state(&self) -> Result<&str> {
        self.0["state"]
            .as_str()
            .with_context(|| format!("no state in {}", self.0))
    }

    /// A field that is a number.
    ///
    /// # Errors
    /// It is not there, or no number.
    pub fn number(&self, field: &str) -> Result<u64> {
        self.0[field]
            .as_u64()
            .with_context(|| format!("no number {field} in {}", self.0))
    }
}
