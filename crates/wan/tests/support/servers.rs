//! Other people's servers, started on Unix sockets or free loopback ports for one test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hikkoshi_wan::Address;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::wait_until;

/// Where a server in the background says which process it is.
const PID_FILE: &str = "pid";

/// A running server; it ends with this value.
pub struct Server {
    child: Child,
    pub address: Address,
    dir: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // One that went to the background left its number.
        let text = std::fs::read_to_string(self.dir.path().join(PID_FILE)).unwrap_or_default();
        if let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

/// A port that is free now.
fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// Where a server is to listen.
#[derive(Clone, Copy, Debug)]
pub enum On {
    Unix,
    Tcp,
}

impl Server {
    /// Starts `program` (of Debian's `package`) with the arguments that `arguments` makes of an
    /// image with `data` in it, an address and a directory of its own. One that goes to the
    /// background writes its number to [`PID_FILE`] there.
    pub fn start(
        (program, package): (&str, &str),
        data: &[u8],
        on: On,
        arguments: impl Fn(&Path, &Address, &Path) -> Vec<String>,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("disk.img");
        std::fs::write(&image, data).unwrap();
        let address = match on {
            On::Unix => Address::Unix(dir.path().join("nbd.sock")),
            On::Tcp => Address::Tcp {
                host: "127.0.0.1".to_owned(),
                port: free_port(),
            },
        };
        let child = Command::new(program)
            .args(arguments(&image, &address, dir.path()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("cannot run {program}: {error}; install Debian's package {package}")
            });
        let mut server = Self {
            child,
            address,
            dir,
        };
        let mut ended = None;
        wait_until("the server listens or ends", || {
            ended = server.child.try_wait().unwrap();
            ended.is_some_and(|status| !status.success()) || server.listens()
        });
        let failed = ended.filter(|status| !status.success());
        assert!(failed.is_none(), "{program} ended at once: {failed:?}");
        server
    }

    /// Whether it listens, without connecting: a server for one client would count that.
    fn listens(&self) -> bool {
        // A Unix socket is listed once bound; the flag says that it also listens.
        let (table, needle, flag) = match &self.address {
            Address::Unix(path) => ("/proc/net/unix", path.display().to_string(), " 00010000 "),
            Address::Tcp { port, .. } => (
                "/proc/net/tcp",
                format!("0100007F:{port:04X}"),
                " 00000000:0000 0A ",
            ),
        };
        let table = std::fs::read_to_string(table).unwrap();
        table
            .lines()
            .any(|line| line.contains(&needle) && line.contains(flag))
    }

    /// A directory that lives as long as the server.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().to_owned()
    }
}

fn strings(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|&a| a.to_owned()).collect()
}

fn where_to(address: &Address, unix: &str, host: &str, port_flag: &str) -> Vec<String> {
    match address {
        Address::Unix(path) => vec![unix.to_owned(), path.display().to_string()],
        Address::Tcp { host: name, port } => {
            vec![
                host.to_owned(),
                name.clone(),
                port_flag.to_owned(),
                port.to_string(),
            ]
        }
    }
}

/// qemu-nbd for `clients` clients.
pub fn qemu_nbd(data: &[u8], on: On, clients: &str, more: &[&str]) -> Server {
    Server::start(("qemu-nbd", "qemu-utils"), data, on, |image, address, _| {
        let mut arguments = strings(&["-t", "-f", "raw", "-e", clients]);
        arguments.extend(strings(more));
        arguments.extend(where_to(address, "-k", "-b", "-p"));
        arguments.push(image.display().to_string());
        arguments
    })
}

/// nbdkit with a plugin: `file`, or `data` that is filled from the image (`memory`, `sparse`).
pub fn nbdkit(data: &[u8], on: On, plugin: &str, more: &[&str]) -> Server {
    Server::start(("nbdkit", "nbdkit"), data, on, |image, address, _| {
        let mut arguments = strings(&["-f", "-r"]);
        arguments.extend(where_to(address, "-U", "-i", "-p"));
        arguments.extend(strings(more));
        let image = image.display();
        arguments.extend(match plugin {
            "file" => vec!["file".to_owned(), image.to_string()],
            allocator => strings(&["data", "size=0", &format!("allocator={allocator}")])
                .into_iter()
                .filter(|a| a != "size=0")
                .chain([format!("<{image}")])
                .collect(),
        });
        arguments
    })
}

/// nbd-server, which wants a configuration.
pub fn nbd_server(data: &[u8], on: On) -> Server {
    Server::start(
        ("nbd-server", "nbd-server"),
        data,
        on,
        |image, address, dir| {
            let listen = match address {
                Address::Unix(path) => format!(
                    "unixsock={}\nlistenaddr=127.0.0.1\nport={}",
                    path.display(),
                    free_port()
                ),
                Address::Tcp { host, port } => format!("listenaddr={host}\nport={port}"),
            };
            let config = dir.join("config");
            let text = format!(
                "[generic]\n{listen}\n[disk]\nexportname={}\n",
                image.display()
            );
            std::fs::write(&config, text).unwrap();
            let pid = dir.join(PID_FILE).display().to_string();
            // Its debugging mode, which stays in the foreground, now and then never greets the
            // first client (nbdinfo waits in vain just so).
            strings(&["-C", &config.display().to_string(), "-p", &pid])
        },
    )
}
