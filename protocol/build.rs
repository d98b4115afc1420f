//! Generates the agent's messages and async ttrpc service from `proto/agent.proto`, and the messages
//! of `proto/cri.proto`.
use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto", "proto/cri.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    // The code generator lists the messages in mod.rs and leaves the service out.
    let index = std::path::Path::new(&out).join("mod.rs");
    let modules = std::fs::read_to_string(&index)?;
    std::fs::write(&index, format!("{modules}\npub mod agent_ttrpc;\n"))?;
    Ok(())
}
