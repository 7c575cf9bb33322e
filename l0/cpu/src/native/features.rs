//! The instruction-set extensions that thunks may use, as a bit set: what an instruction needs, what the host has.

use std::sync::OnceLock;

use iced_x86::CpuidFeature;

/// A set of extensions.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct FeatureSet(u32);

macro_rules! features {
    ($($bit:literal $name:ident $iced:pat, $host:expr;)*) => {
        impl FeatureSet {
            $(pub(crate) const $name: Self = Self(1 << $bit);)*

            /// The set with the one extension iced calls `feature`; none for those we do not know.
            fn of_one(feature: CpuidFeature) -> Option<Self> {
                match feature {
                    $($iced => Some(Self::$name),)*
                    CpuidFeature::INTEL8086 | CpuidFeature::INTEL386 | CpuidFeature::X64 => Some(Self(0)),
                    _ => None,
                }
            }

            fn detect() -> Self {
                let mut set = 0;
                $(if $host { set |= Self::$name.0; })*
                Self(set)
            }
        }
    };
}

use CpuidFeature as F;
features! {
    0 FPU F::FPU | F::FPU287 | F::FPU387 | F::INTEL8086_ONLY, true;
    1 CMOV F::CMOV, true;
    2 MMX F::MMX, true;
    3 SSE F::SSE, true;
    4 SSE2 F::SSE2, true;
    5 SSE3 F::SSE3, is_x86_feature_detected!("sse3");
    6 SSSE3 F::SSSE3, is_x86_feature_detected!("ssse3");
    7 SSE4_1 F::SSE4_1, is_x86_feature_detected!("sse4.1");
    8 SSE4_2 F::SSE4_2, is_x86_feature_detected!("sse4.2");
    9 AES F::AES, is_x86_feature_detected!("aes");
    10 PCLMULQDQ F::PCLMULQDQ, is_x86_feature_detected!("pclmulqdq");
    11 SHA F::SHA, is_x86_feature_detected!("sha");
    12 GFNI F::GFNI, is_x86_feature_detected!("gfni");
    13 AVX F::AVX, is_x86_feature_detected!("avx");
    14 AVX2 F::AVX2, is_x86_feature_detected!("avx2");
    15 FMA F::FMA, is_x86_feature_detected!("fma");
    16 F16C F::F16C, is_x86_feature_detected!("f16c");
    17 VAES F::VAES, is_x86_feature_detected!("vaes");
    18 VPCLMULQDQ F::VPCLMULQDQ, is_x86_feature_detected!("vpclmulqdq");
    19 AVX_VNNI F::AVX_VNNI, is_x86_feature_detected!("avxvnni");
}

impl FeatureSet {
    /// Both sets.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// True if every extension of `other` is in the set.
    #[inline(always)]
    pub(crate) const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The extensions that all of `features` stand for; none if one of them is not ours to execute.
    pub(crate) fn of(features: &[CpuidFeature]) -> Option<Self> {
        features.iter().try_fold(Self(0), |set, &f| Some(set.and(Self::of_one(f)?)))
    }

    /// What the host's processor (and its kernel) can execute.
    pub(crate) fn host() -> Self {
        static HOST: OnceLock<FeatureSet> = OnceLock::new();
        *HOST.get_or_init(Self::detect)
    }
}
