//! What a VM's disks stand on, by QEMU's account: which NBD exports, and what else.
//!
//! Reads the answer to `query-named-block-nodes`. Only nodes that touch the outside world count;
//! formats and filters above them do not.

use serde_json::Value;

/// Drivers that open something on the host itself.
const LOCAL_DRIVERS: &[&str] = &[
    "file",
    "host_device",
    "host_cdrom",
    "nvme",
    "nvme-io_uring",
    "io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
    "vvfat",
];

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An NBD export, by its name.
    Nbd {
        /// The export's name.
        export: String,
    },
    /// A file or device of the host.
    Local,
}

/// A node that touches the outside world. Storage that both sites reach by themselves (Ceph, iSCSI,
/// NFS) is none: it needs no moving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// QEMU's name for it.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The file name, as QEMU tells it.
    pub file: String,
}

/// The nodes in the answer to `query-named-block-nodes`.
///
/// # Errors
/// The answer is not of that form.
pub fn nodes(answer: &Value) -> Result<Vec<Node>, String> {
    let list = answer
        .as_array()
        .ok_or("QEMU's list of block nodes is no list")?;
    let mut found = Vec::new();
    for entry in list {
        let text = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
        let (driver, file) = (text("drv"), text("file"));
        let kind = if driver == "nbd" {
            let export = export_name(&file).ok_or_else(|| {
                format!("QEMU tells of a disk on NBD as {file:?}, which is not understood")
            })?;
            Kind::Nbd { export }
        } else if LOCAL_DRIVERS.contains(&driver.as_str()) {
            Kind::Local
        } else {
            continue;
        };
        let size = entry["image"]["virtual-size"].as_u64();
        found.push(Node {
            name: text("node-name"),
            kind,
            read_only: entry["ro"].as_bool().unwrap_or(false),
            size_bytes: size.ok_or("QEMU tells of a block node without a size")?,
            file,
        });
    }
    Ok(found)
}

/// The export's name in QEMU's file name of an NBD node (`nbd_refresh_filename` in QEMU): a URI in
/// which nothing is escaped, or `json:` with the node's options.
fn export_name(file: &str) -> Option<String> {
    if let Some(options) = file.strip_prefix("json:") {
        let options: Value = serde_json::from_str(options).ok()?;
        return Some(options["export"].as_str().unwrap_or_default().to_owned());
    }
    if let Some(rest) = file.strip_prefix("nbd+unix://") {
        let rest = rest.strip_prefix('/').unwrap_or(rest);
        let (name, _) = rest.rsplit_once("?socket=")?;
        return Some(name.to_owned());
    }
    let rest = file.strip_prefix("nbd://")?;
    Some(
        rest.split_once('/')
            .map_or_else(String::new, |(_, name)| name.to_owned()),
    )
}

/// Gives every export of `exports` (name and size) a node of its own; returns the index of the node
/// for each, or the index of an export for which there is none.
///
/// An export fits a node of its name and size; a node without a name fits any export of its size,
/// because a daemon's only export answers to the empty name, too.
pub fn assign(exports: &[(&str, u64)], nodes: &[&Node]) -> Result<Vec<usize>, usize> {
    let fits = |export: usize, node: usize| {
        let Kind::Nbd { export: name } = &nodes[node].kind else {
            return false;
        };
        // QEMU counts in sectors of 512 bytes.
        let same_size = exports[export].1.div_ceil(512) == nodes[node].size_bytes.div_ceil(512);
        same_size && (name == exports[export].0 || name.is_empty())
    };
    let mut owner: Vec<Option<usize>> = vec![None; nodes.len()];
    for export in 0..exports.len() {
        let mut seen = vec![false; nodes.len()];
        if !find_node(export, &fits, &mut owner, &mut seen) {
            return Err(export);
        }
    }
    let mut assigned = vec![0; exports.len()];
    for (node, export) in owner.iter().enumerate() {
        if let Some(export) = export {
            assigned[*export] = node;
        }
    }
    Ok(assigned)
}

/// One step of a bipartite matching: a node for `export`, if need be by moving another export to
/// another node.
fn find_node(
    export: usize,
    fits: &dyn Fn(usize, usize) -> bool,
    owner: &mut [Option<usize>],
    seen: &mut [bool],
) -> bool {
    for node in 0..owner.len() {
        if seen[node] || !fits(export, node) {
            continue;
        }
        seen[node] = true;
        let free = match owner[node] {
            None => true,
            Some(other) => find_node(other, fits, owner, seen),
        };
        if free {
            owner[node] = Some(export);
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn nbd(export: &str, size_bytes: u64) -> Node {
        Node {
            name: format!("node-{export}"),
            kind: Kind::Nbd {
                export: export.into(),
            },
            read_only: false,
            size_bytes,
            file: String::new(),
        }
    }

    #[test]
    fn every_way_in_which_qemu_names_an_export() {
        for (file, name) in [
            ("nbd://127.0.0.1:10809", ""),
            ("nbd://127.0.0.1:10809/web", "web"),
            ("nbd://[::1]:10809/a/b", "a/b"),
            ("nbd+unix://?socket=/run/vm.sock", ""),
            ("nbd+unix:///web?socket=/run/vm.sock", "web"),
            (
                r#"json:{"server.path": "/s", "driver": "nbd", "server.type": "unix", "export": "web"}"#,
                "web",
            ),
            (r#"json:{"driver": "nbd", "server.path": "/s"}"#, ""),
        ] {
            assert_eq!(export_name(file).as_deref(), Some(name), "{file}");
        }
        assert_eq!(export_name("disk.img"), None);
        assert_eq!(export_name("json:{"), None);
    }

    #[test]
    fn only_what_touches_the_outside_world_counts() {
        let node = |name: &str, drv: &str, file: &str| {
            json!({"node-name": name, "drv": drv, "file": file, "ro": drv == "host_cdrom",
                   "image": {"virtual-size": 512}})
        };
        let answer = json!([
            node("disk", "raw", "nbd://h:1/web"),
            node("net", "nbd", "nbd://h:1/web"),
            node("log", "blklogwrites", "json:{}"),
            node("cd", "host_cdrom", "/dev/sr0"),
            node("ceph", "rbd", "json:{}"),
            node("vars", "file", "/vars.fd"),
        ]);
        let found = nodes(&answer).unwrap();
        let names: Vec<_> = found.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["net", "cd", "vars"]);
        assert!(found[1].read_only && !found[2].read_only);
        assert!(nodes(&json!({})).is_err());
        assert!(nodes(&json!([node("net", "nbd", "x")])).is_err());
    }

    #[test]
    fn each_export_has_a_node_of_its_own() {
        let (web, data, plain) = (nbd("web", 1024), nbd("data", 1024), nbd("", 1024));
        assert_eq!(
            assign(&[("web", 1024), ("data", 1024)], &[&data, &web]),
            Ok(vec![1, 0])
        );
        // The nameless one is for the export that has no other.
        assert_eq!(
            assign(&[("web", 1024), ("data", 1024)], &[&plain, &web]),
            Ok(vec![1, 0])
        );
        assert_eq!(assign(&[("web", 1024), ("web", 1024)], &[&web]), Err(1));
        assert_eq!(assign(&[("web", 2048)], &[&web]), Err(0));
        assert_eq!(assign(&[("web", 1000)], &[&web]), Ok(vec![0]));
        assert_eq!(assign(&[("db", 1024)], &[&web]), Err(0));
    }
}
