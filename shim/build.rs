//! Generates the messages of proto/cri.proto.

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR").map_err(std::io::Error::other)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/cri.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generated file carries inner attributes, which only a file of its own may have: so it is a module of this one.
    std::fs::write(format!("{out}/mod.rs"), "pub mod cri;\n")
}
