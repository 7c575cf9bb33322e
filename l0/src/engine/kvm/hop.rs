//! `--engine kvm,hop`: a test mode that changes between KVM and the software CPU at random, wherever it may: whatever a
//! guest does must look the same, because a vCPU is plain data that both agree on.

/// Decides when.
pub(super) struct Hop {
    state: u64,
}

impl Hop {
    /// A sequence of its own for each vCPU, the same in every run.
    pub(super) fn new(vcpu: usize) -> Self {
        Self { state: vcpu as u64 }
    }

    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ self.state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// The state is at home: instructions for the software CPU, one to some thousands, or none to go to KVM.
    pub(super) fn burst(&mut self) -> Option<u64> {
        let random = self.next();
        (random & 1 == 0).then(|| (random >> 32 & 0xfff) >> (random >> 8 & 0xf).min(12) | 1)
    }

    /// The state is in KVM, which has come back: take it home?
    pub(super) fn leaves(&mut self) -> bool {
        self.next() & 3 == 0
    }

    /// A number from 1 to `most`.
    pub(super) fn up_to(&mut self, most: u64) -> u64 {
        self.next() % most.max(1) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_and_all_lengths_occur() {
        let mut hop = Hop::new(0);
        let bursts: Vec<_> = (0..1000).map(|_| hop.burst()).collect();
        assert!(bursts.iter().flatten().all(|&n| (1..=0xfff).contains(&n)));
        assert!((300..700).contains(&bursts.iter().flatten().count()));
        assert!(bursts.contains(&Some(1)) && bursts.iter().flatten().any(|&n| n > 1000));
        assert!((0..100).map(|_| hop.leaves()).filter(|&leaves| leaves).count() > 5);
    }
}
