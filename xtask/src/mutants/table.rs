//! The mutations: what a careless hand might do to the order on which everything rests.
//!
//! Each must make the simulator fail. One that changes nothing a client could ever notice does not
//! belong here.

/// One mutation: edits of one file.
#[derive(Debug)]
pub struct Mutation {
    /// Its name.
    pub name: &'static str,
    /// The file, from the workspace's root.
    pub file: &'static str,
    /// Pieces of text, each found exactly once, and what takes their place.
    pub edits: &'static [(&'static str, &'static str)],
}

const COMMIT: &str = "crates/daemon/src/volume/commit.rs";
const DEPARTURE: &str = "crates/daemon/src/volume/departure.rs";
const ARRIVAL: &str = "crates/daemon/src/volume/arrival.rs";
const GATE: &str = "crates/daemon/src/volume/gate.rs";
const SOURCE_FLUSH: &str = "crates/daemon/src/volume/source_flush.rs";
const GUEST: &str = "crates/daemon/src/volume/guest.rs";
const RELOCATION: &str = "crates/daemon/src/volume/relocation.rs";
const VOLUME: &str = "crates/daemon/src/volume/mod.rs";
const STATE: &str = "crates/store/src/state/mod.rs";
const SUSPECT: &str = "crates/store/src/suspect.rs";
const TIES: &str = "crates/daemon/src/volume/ties.rs";
const WAYBACK: &str = "crates/daemon/src/volume/wayback.rs";
const LIVE: &str = "crates/store/src/live.rs";
const RESIDENCY: &str = "crates/engine/src/residency/mod.rs";

/// The five that every run of CI tries.
pub const FIRST: usize = 5;

/// All of them; the first [`FIRST`] are the ones without which a simulator is none.
pub const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "record before data",
        file: COMMIT,
        edits: &[
            (
                "        // 2. their data\n        self.sync_image()?;\n",
                "",
            ),
            (
                "        let took = self.now()",
                "        self.sync_image()?;\n        let took = self.now()",
            ),
        ],
    },
    Mutation {
        name: "no second look before installing",
        file: RELOCATION,
        edits: &[(
            "                // bytes are the older ones.\n                \
             BlockState::Clean | BlockState::Owned => {}",
            "                BlockState::Clean | BlockState::Owned => {\n                    \
             self.install_absent(run, fetched)?;\n                }",
        )],
    },
    Mutation {
        name: "flush acknowledged early",
        file: COMMIT,
        edits: &[(
            "        let outcome = self.commit();\n",
            "        for done in waiting {\n            done(Ok(()));\n        }\n        \
             let waiting: Vec<FlushDone> = Vec::new();\n        let outcome = self.commit();\n",
        )],
    },
    Mutation {
        name: "Clean record ahead of its data",
        file: RELOCATION,
        edits: &[(
            "        for (offset, piece, zero) in zero_runs(bytes.start, data) {",
            "        self.leave(|| Some(Record::Clean(run)));\n        \
             for (offset, piece, zero) in zero_runs(bytes.start, data) {",
        )],
    },
    Mutation {
        name: "partial block merged the wrong way",
        file: RELOCATION,
        edits: &[(
            "            self.store.write(at, data(at, len)?)?;\n        }\n",
            "            let _ = (at, len);\n        }\n        \
             let all = self.geometry.bytes(BlockRange::one(block));\n        \
             self.store.write(base, data(base, all.len())?)?;\n",
        )],
    },
    // The rest, by file.
    Mutation {
        name: "records taken after the sync",
        file: COMMIT,
        edits: &[
            (
                "        // 1. the records first",
                "        self.sync_image()?;\n        // 1. the records first",
            ),
            (
                "        // 2. their data\n        self.sync_image()?;\n",
                "",
            ),
        ],
    },
    Mutation {
        name: "inline flush without records",
        file: COMMIT,
        edits: &[(
            "        let mut journal = self.journal.try_lock().ok()?;\n        \
             Some(self.commit_locked(&mut journal))",
            "        let _journal = self.journal.try_lock().ok()?;\n        \
             Some(self.check_poison().and_then(|()| self.sync_image()))",
        )],
    },
    Mutation {
        name: "completion without a last commit",
        file: COMMIT,
        edits: &[(
            "        self.commit_locked(&mut journal)?;\n        crash_point!(\"completion.committed\");\n",
            "",
        )],
    },
    Mutation {
        name: "poison ignored",
        file: VOLUME,
        edits: &[(
            "        if self.is_poisoned() {\n            return Err",
            "        if false {\n            return Err",
        )],
    },
    Mutation {
        name: "handoff not durable",
        file: GUEST,
        edits: &[(
            "            let outcome = state.record_arriving_but(at_source, lacking, owed);\n",
            "            let _ = (state, at_source, lacking);\n            let outcome = Ok(());\n",
        )],
    },
    Mutation {
        name: "marks before data",
        file: GUEST,
        edits: &[
            (
                "        // 1. the data\n        change.apply(&*self.store, bytes)?;\n",
                "",
            ),
            (
                "        crash_point!(\"change.marked\");\n        Ok(true)",
                "        crash_point!(\"change.marked\");\n        \
                 change.apply(&*self.store, bytes)?;\n        \
                 Ok(true)",
            ),
        ],
    },
    Mutation {
        name: "write into missing blocks without their lock",
        file: GUEST,
        edits: &[(
            "let _guard = self.locks.lock(blocks);",
            "let _guard = self.locks.lock(BlockRange::new(0, 0));",
        )],
    },
    Mutation {
        name: "trim zeroes parts of blocks",
        file: GUEST,
        edits: &[(
            "bytes = relocation.geometry.bytes(relocation.geometry.within(bytes));",
            "bytes = relocation.geometry.bytes(relocation.geometry.covering(bytes));",
        )],
    },
    Mutation {
        name: "sectors that nobody wrote here read here",
        file: RESIDENCY,
        edits: &[(
            "(first..end).all(|s| u32::try_from(s).is_ok_and(|sector| mask.has(sector)))",
            "first < end && mask.has_any(2048)",
        )],
    },
    Mutation {
        name: "no record of a partial block",
        file: GUEST,
        edits: &[(
            "            Some(if is_whole {\n                \
             Record::Owned(BlockRange::one(block))\n            } else {\n                \
             Record::Partial { block, mask }\n            })",
            "            let _ = mask;\n            \
             is_whole.then_some(Record::Owned(BlockRange::one(block)))",
        )],
    },
    Mutation {
        name: "install without the lock",
        file: RELOCATION,
        edits: &[(
            "    fn install(&self, range: BlockRange, fetched: &Fetched) -> io::Result<bool> {\n        \
             let guard = self.locks.lock(range);",
            "    fn install(&self, range: BlockRange, fetched: &Fetched) -> io::Result<bool> {\n        \
             let guard = self.locks.lock(BlockRange::new(0, 0));",
        )],
    },
    Mutation {
        name: "no record of an owned block",
        file: RELOCATION,
        edits: &[(
            "            Some(Record::Owned(run))\n",
            "            None\n",
        )],
    },
    Mutation {
        name: "record left after its mark, and not with it",
        file: RELOCATION,
        edits: &[(
            "        self.leave(|| {\n            self.residency.mark_owned(run);\n            \
             Some(Record::Owned(run))\n        });",
            "        self.residency.mark_owned(run);\n        \
             self.leave(|| Some(Record::Owned(run)));",
        )],
    },
    Mutation {
        name: "what passes through is kept",
        file: RELOCATION,
        edits: &[(
            "                if keep {",
            "                if keep || true {",
        )],
    },
    Mutation {
        name: "answered from what was not installed",
        file: RELOCATION,
        edits: &[(
            "                if whole {",
            "                if whole || true {",
        )],
    },
    Mutation {
        name: "log not synced",
        file: STATE,
        edits: &[(
            "            this.log.sync().map_err(|source| {",
            "            Ok(()).map_err(|source: io::Error| {",
        )],
    },
    Mutation {
        name: "snapshot in place before its data is durable",
        file: STATE,
        edits: &[
            (
                "            sync_data().map_err(|source| {\n                \
                 this.failed(\"syncing the image of\", VOLUME, io::Error::other(source))\n            \
                 })?;\n",
                "",
            ),
            (
                "            crash_point!(\"snapshot.done\");\n            this.epoch = epoch;",
                "            sync_data().map_err(|source| this.failed(\"syncing\", VOLUME, source))?;\n            \
                 this.epoch = epoch;",
            ),
        ],
    },
    Mutation {
        name: "memory of a killed process forgotten",
        file: LIVE,
        edits: &[(
            "match place.find(state.identity())? {",
            "match place.find(state.identity())?.filter(|_| false) {",
        )],
    },
    Mutation {
        name: "memory believed before it is filled",
        file: LIVE,
        edits: &[(
            "            // A state that is refused is left exactly as it was.\n",
            "            place.publish(&live, state.identity())?;\n",
        )],
    },
    Mutation {
        name: "no new epoch at the opening",
        file: LIVE,
        edits: &[(
            "    state.checkpoint(&residency, sync_data)?;\n",
            "    let _ = sync_data;\n",
        )],
    },
    Mutation {
        name: "completion that a kill cut short believed",
        file: LIVE,
        edits: &[("    state.confirm()?;\n", "")],
    },
    Mutation {
        name: "kill forgets the masks",
        file: RESIDENCY,
        edits: &[(
            "let mut index = Index::recover(this.layout, &*this.memory, keep);",
            "let mut index = Index::recover(this.layout, &*this.memory, |b| keep(b) && false);",
        )],
    },
    Mutation {
        name: "page cache believed after a failed sync",
        file: SUSPECT,
        edits: &[(
            "        if let Err(e) = mark.raise() {",
            "        if let Err(e) = mark.is_raised() {",
        )],
    },
    Mutation {
        name: "fence answered before it is durable",
        file: DEPARTURE,
        edits: &[(
            "            let outcome = state.change(|identity| {\n                \
             identity.ties.departed = Some(departure);\n                \
             identity.ties.moved_to = moved_to;\n            });\n            \
             self.note_state(\"recording the departure\", outcome)?;\n",
            "            let _ = (state, moved_to);\n",
        )],
    },
    Mutation {
        name: "fence before what was written is durable",
        file: DEPARTURE,
        edits: &[(
            "        self.commit_locked(&mut journal)?;\n        crash_point!(\"fence.synced\");\n",
            "",
        )],
    },
    Mutation {
        name: "fence does not wait for writes under way",
        file: GATE,
        edits: &[(
            "while self.state.load(Ordering::Acquire) != CLOSED {",
            "while self.state.load(Ordering::Acquire) & CLOSED == 0 {",
        )],
    },
    Mutation {
        name: "last changes dropped",
        file: ARRIVAL,
        edits: &[(
            "                state.precopy.changed(changes.blocks.iter().copied());\n                \
             state.precopy.finish()\n",
            "                let _ = changes.blocks.iter().copied();\n                \
             state.precopy.finish()\n",
        )],
    },
    Mutation {
        name: "change marked before it is made",
        file: GUEST,
        edits: &[(
            "        let outcome = make();\n        self.changed(bytes);\n",
            "        self.changed(bytes);\n        let outcome = make();\n",
        )],
    },
    Mutation {
        name: "first write before the source has answered",
        file: GUEST,
        edits: &[(
            "        let mut takeover = self.take_over(arrival)?;\n",
            "        self.record_handoff(None)?;\n        \
             let mut takeover = self.take_over(arrival)?;\n",
        )],
    },
    Mutation {
        name: "write without a handoff",
        file: GUEST,
        edits: &[("            self.admit_first_write()?;\n", "")],
    },
    Mutation {
        name: "fence that giving up does not lift",
        file: DEPARTURE,
        edits: &[(
            "        if handover::abort(departed, id) {\n",
            "        if handover::abort(departed, id) && known {\n",
        )],
    },
    Mutation {
        name: "flush before the handoff answered here",
        file: SOURCE_FLUSH,
        edits: &[(
            "            LifeState::Standby => true,\n",
            "            LifeState::Standby => false,\n",
        )],
    },
    Mutation {
        name: "no flush owed after the handoff",
        file: GUEST,
        edits: &[("            self.owes_a_flush();\n", "")],
    },
    Mutation {
        name: "flush owed forgotten by a restart",
        file: STATE,
        edits: &[(
            "            identity.ties.source_flush_owed = source_flush_owed;\n",
            "            identity.ties.source_flush_owed = source_flush_owed && false;\n",
        )],
    },
    // The way back.
    Mutation {
        name: "way back: what changed after the first handoff not told",
        file: DEPARTURE,
        edits: &[(
            "                for run in runs {\n                    session.map.mark(run);\n                }\n",
            "                drop(runs);\n",
        )],
    },
    Mutation {
        name: "way back: what is told to differ is not copied",
        file: ARRIVAL,
        edits: &[(
            "                    for range in ranges {\n                        \
             state.precopy.differs(range);\n                    }\n",
            "                    drop(ranges);\n",
        )],
    },
    Mutation {
        name: "way back: record believed after a power cut",
        file: WAYBACK,
        edits: &[(
            "        None if survived => None,\n",
            "        None => None,\n",
        )],
    },
    Mutation {
        name: "way back: old copy believed whoever wrote into it",
        file: TIES,
        edits: &[(
            "    if departure.image_mtime != modified || !same_file {\n",
            "    if !same_file {\n",
        )],
    },
    Mutation {
        name: "way back: what is written to a whole disk not recorded",
        file: GUEST,
        edits: &[(
            "                if relocation.residency.all_resident(blocks) {\n                    \
             relocation.own(blocks);\n",
            "                if relocation.residency.all_resident(blocks) {\n                    \
             if !self.is_local() {\n                        relocation.own(blocks);\n                    }\n",
        )],
    },
    Mutation {
        name: "way back: what was copied ahead changes after the handoff",
        file: ARRIVAL,
        edits: &[(
            "        arrival.installing.close();\n        let mut state = arrival.state();\n",
            "        let mut state = arrival.state();\n",
        )],
    },
    Mutation {
        name: "early return: copied ahead into an old copy that is needed",
        file: ARRIVAL,
        edits: &[
            (
                "        self.prepare = Prepare::None;\n        self.installing.close();\n",
                "",
            ),
            (
                "        if arrival.only_here {\n            return Err(io::Error::other(\"the old copy is needed as it is\"));\n        }\n",
                "",
            ),
            (
                "            let has_base = arrival.has_base && !arrival.only_here;\n",
                "            let has_base = arrival.has_base;\n",
            ),
        ],
    },
    Mutation {
        name: "early return: rests of blocks not waited for",
        file: DEPARTURE,
        edits: &[
            (
                "                if session.needed\n                    && let Err(why) = self.complete_partials(REST_LIMIT)\n                {\n                    self.departures.gate.open();\n                    return Err(why);\n                }\n",
                "",
            ),
            ("                    self.complete_most_partials()?;\n", ""),
        ],
    },
];
