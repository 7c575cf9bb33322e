//! `--cpu`: the model and its flags. Flags that begin with `vmx-` say what of VMX is offered; the others are CPUID's.

use turtles_cpu::cpuid::{CpuModel, CpuModelError, Feature};
use vmcs_shadow::caps::{Capabilities, UnknownFlag};
use x86defs::cpuid::{FEATURES, FeatureBit};

/// Why a `--cpu` value was refused.
#[derive(Debug, thiserror::Error)]
pub enum CpuOptionError {
    #[error(transparent)]
    Model(#[from] CpuModelError),
    #[error("CPU flag '{name}': {source}")]
    Vmx { name: String, source: UnknownFlag },
    #[error("bad value '{value}' for CPU flag '{name}': say on or off")]
    BadValue { name: String, value: String },
}

/// What `--cpu` asked for.
pub struct CpuOption {
    text: String,
    pub model: CpuModel,
    /// None if the model has no VMX.
    pub vmx: Option<Capabilities>,
}

impl CpuOption {
    /// Reads `model[,+flag|,-flag|,flag=on|,flag=off]...`.
    pub fn parse(text: &str) -> Result<Self, CpuOptionError> {
        let is_vmx = |part: &&str| part.trim_start_matches(['+', '-']).starts_with("vmx-");
        let (vmx_flags, others): (Vec<&str>, Vec<&str>) = text.split(',').map(str::trim).partition(is_vmx);
        let model = CpuModel::parse(&others.join(","))?;
        let mut capabilities = Capabilities::default();
        for flag in vmx_flags {
            let (name, on) = switch(flag)?;
            capabilities
                .set_flag(name, on)
                .map_err(|source| CpuOptionError::Vmx { name: name.to_owned(), source })?;
        }
        capabilities.follow_cpu(|feature| model.has(feature));
        capabilities.cr4_allowed = model.cr4_allowed();
        let vmx = model.has(Feature::Vmx).then_some(capabilities);
        Ok(Self { text: text.to_owned(), model, vmx })
    }

    /// The same without VMX, for an engine that cannot give it.
    pub fn without_vmx(self) -> Result<Self, CpuOptionError> {
        if self.vmx.is_none() {
            return Ok(self);
        }
        let vmx_flag = |part: &&str| !part.trim_start_matches(['+', '-']).starts_with("vmx-");
        let others: Vec<&str> = self.text.split(',').map(str::trim).filter(vmx_flag).collect();
        Self::parse(&format!("{},-vmx", others.join(",")))
    }

    /// The same less the features that an engine cannot give: every engine shows the guest one and the same processor.
    pub fn limited_to(self, gives: impl Fn(&FeatureBit) -> bool) -> Result<Self, CpuOptionError> {
        let mut text = self.text.clone();
        for lost in FEATURES.iter().filter(|bit| self.model.has(bit.feature) && !gives(bit)) {
            text += &format!(",-{}", lost.name);
        }
        if text == self.text { Ok(self) } else { Self::parse(&text) }
    }
}

fn switch(flag: &str) -> Result<(&str, bool), CpuOptionError> {
    if let Some(name) = flag.strip_prefix('+') {
        return Ok((name, true));
    }
    if let Some(name) = flag.strip_prefix('-') {
        return Ok((name, false));
    }
    match flag.split_once('=') {
        None | Some((_, "on")) => Ok((flag.split('=').next().unwrap_or(flag), true)),
        Some((name, "off")) => Ok((name, false)),
        Some((name, value)) => {
            Err(CpuOptionError::BadValue { name: name.to_owned(), value: value.to_owned() })
        }
    }
}
