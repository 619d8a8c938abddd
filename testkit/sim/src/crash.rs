//! What a crash leaves of the media of a machine.

use std::sync::Arc;

use crate::disk::{Disk, choose};
use crate::sim::Sim;
use crate::statedir::{SimDirectory, SimMemory};

/// The process ends, or with `power` the machine: puts what is left of its media in their place. What
/// the dead process still holds of them reaches nobody any more.
pub fn strike(
    sim: &Arc<Sim>,
    power: bool,
    disk: &mut Arc<Disk>,
    dir: &mut SimDirectory,
    memory: &mut SimMemory,
) {
    if power {
        // All lost, all kept, or write by write.
        let mode = sim.below(5);
        let mut fate = |n: u32| match mode {
            0 => 0,
            1 => 1,
            _ => choose(sim, n),
        };
        *disk = disk.power_cut(&mut fate);
        *dir = dir.power_cut(&mut fate);
        *memory = SimMemory::new(sim);
    } else {
        *disk = disk.kill();
        *dir = dir.kill();
        *memory = memory.kill();
    }
}
