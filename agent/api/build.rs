//! Generates the code of proto/agent.proto: its messages, and its ttrpc client and server.
fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR").map_err(std::io::Error::other)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generated files carry inner attributes, which only a file of its own may have: so they are modules of this one.
    std::fs::write(format!("{out}/mod.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")
}
