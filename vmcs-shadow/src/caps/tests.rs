use super::*;

fn with(flags: &[(&str, bool)]) -> Capabilities {
    let mut caps = Capabilities::default();
    for &(name, on) in flags {
        caps.set_flag(name, on).expect(name);
    }
    caps
}

/// Values put together by hand from appendix A.
#[test]
fn msrs_of_the_default_offer() {
    let caps = Capabilities::default();
    let msr = |index| caps.msr(index).expect("exists");
    assert_eq!(msr(0x480), u64::from(REVISION) | 0x1000 << 32 | 6 << 50 | 7 << 54);
    assert_eq!(REVISION >> 31, 0);
    assert_eq!(msr(0x481), 0x0000_00ff_0000_0016);
    assert_eq!(msr(0x482), 0xfff9_fffe_0401_e172);
    assert_eq!(msr(0x483), 0x007f_efff_0003_6dff);
    assert_eq!(msr(0x484), 0x0000_d3ff_0000_11ff);
    assert_eq!(msr(0x485), 5 | 0xf << 5 | 4 << 16 | 3 << 29);
    assert_eq!(msr(0x486), 0x8000_0021);
    assert_eq!(msr(0x487), 0xffff_ffff);
    assert_eq!(msr(0x488), 0x2000);
    assert_eq!(msr(0x489), caps.cr4_allowed);
    assert_eq!(msr(0x48a), 0x32, "TSC multiplier, 2032H, has index 19H");
    assert_eq!(msr(0x48b), 0x0257_7fff_0000_0000);
    assert_eq!(msr(0x48c), 0x0000_0f01_0673_4141);
    assert_eq!(msr(0x48d), 0x0000_00ff_0000_0016);
    assert_eq!(msr(0x48e), 0xfff9_fffe_0400_6172);
    assert_eq!(msr(0x48f), 0x007f_efff_0003_6dfb);
    assert_eq!(msr(0x490), 0x0000_d3ff_0000_11fb);
    assert_eq!(msr(0x491), 1);
    assert_eq!(caps.msr(0x47f), None);
    assert_eq!(caps.msr(0x492), None);
}

#[test]
fn msrs_that_are_not_there() {
    let caps = with(&[("vmx-secondary-ctls", false)]);
    assert_eq!(caps.msr(0x48b), None);
    assert_eq!(caps.msr(0x48c), None);
    assert_eq!(caps.msr(0x491), None);
    assert_eq!(with(&[("vmx-vmfunc", false)]).msr(0x491), None);
    assert_eq!(with(&[("vmx-ept", false), ("vmx-vpid", false)]).msr(0x48c), None);
    assert_eq!(with(&[("vmx-ept", false)]).msr(0x48c), Some(0x0000_0f01_0000_0000));
    assert_eq!(with(&[("vmx-vpid", false)]).msr(0x48c), Some(0x0673_4141));
    let caps = with(&[("vmx-true-ctls", false)]);
    assert!((0x48d..=0x490).all(|index| caps.msr(index).is_none()));
    assert_eq!(caps.primary().zeros_must_be_one, 0x0401_e172, "VM entry then wants every default1 control");
    assert_eq!(with(&[("vmx-tsc-scaling", false)]).msr(0x48a), Some(0x2e), "the preemption timer's index");
}

#[test]
fn dependents_go_and_come_back() {
    let mut caps = with(&[("vmx-ept", false)]);
    for gone in [
        "vmx-ept",
        "vmx-unrestricted-guest",
        "vmx-pml",
        "vmx-mbec",
        "vmx-ept-violation-ve",
        "vmx-vmfunc",
        "vmx-eptp-switching",
    ] {
        assert!(!caps.is_offered(gone), "{gone}");
    }
    assert!(caps.is_offered("vmx-vpid"));
    caps.set_flag("vmx-ept", true).expect("known");
    assert_eq!(caps.offered, Capabilities::default().offered);

    let caps = with(&[("vmx-flexpriority", false)]);
    for gone in ["vmx-apicv-x2apic", "vmx-apicv-register", "vmx-apicv-vid", "vmx-posted-intr"] {
        assert!(!caps.is_offered(gone), "{gone}");
    }
    assert!(!with(&[("vmx-nmi-exit", false)]).is_offered("vmx-vnmi-pending"), "through virtual NMIs");
    assert!(!with(&[("vmx-eptad", false)]).is_offered("vmx-pml"));
    assert!(!with(&[("vmx-invvpid", false)]).is_offered("vmx-invvpid-all-context"));
}

#[test]
fn controls_follow_the_processor() {
    let mut caps = Capabilities::default();
    caps.follow_cpu(|feature| !matches!(feature, Feature::Rdtscp | Feature::Invpcid));
    assert!(!caps.is_offered("vmx-rdtscp-exit") && !caps.is_offered("vmx-invpcid-exit"));
    caps.set_flag("vmx-rdtscp-exit", true).expect("known");
    assert!(!caps.is_offered("vmx-rdtscp-exit"), "asking does not bring the instruction");
    caps.follow_cpu(|_| true);
    assert_eq!(caps.offered, Capabilities::default().offered);
}

#[test]
fn names() {
    let mut caps = Capabilities::default();
    assert_eq!(caps.set_flag("vmx-eptt", true), Err(UnknownFlag::NoSuchFlag));
    let name = "vmx-page-walk-5";
    assert_eq!(caps.set_flag(name, true), Err(UnknownFlag::NotImplemented { name }));
    assert_eq!(caps.set_flag(name, false), Ok(()));
    assert_eq!(caps.set_flag("vmx-invept-single-context-noglobals", false), Ok(()));
    assert!(!caps.is_offered("vmx-invvpid-single-context-noglobals"));
    for (i, flag) in FLAGS.iter().enumerate() {
        assert!(FLAGS[i + 1..].iter().all(|other| other.name != flag.name), "{}", flag.name);
        assert!(FLAGS[i + 1..].iter().all(|other| other.word != flag.word || other.bits & flag.bits == 0));
    }
    for name in DEPENDENCIES.iter().flat_map(|d| [d.0, d.1]).chain(FEATURES.iter().map(|f| f.0)) {
        assert!(find(name).is_some(), "{name}");
    }
}

#[test]
fn nothing_is_offered_that_is_never_offered() {
    let mut caps = Capabilities::default();
    for flag in FLAGS {
        let _ = caps.set_flag(flag.name, true);
    }
    for flag in FLAGS {
        assert_eq!(caps.is_offered(flag.name), flag.offer != Offer::Never, "{}", flag.name);
    }
    assert_eq!(caps.exit().may_be_one & 1 << 12, 1 << 12, "PERF_GLOBAL_CTRL when asked for");
}
