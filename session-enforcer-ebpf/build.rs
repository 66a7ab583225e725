//! Tells the compiler which architecture the programs will run on.

fn main() {
    aya_build::emit_bpf_target_arch_cfg().expect("cargo sets HOST");
}
