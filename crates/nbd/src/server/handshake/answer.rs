//! What a server sends during the handshake, as bytes.
//!
//! Nothing is decided here, but for where a LIST is cut.

use super::{Context, Refusal};
use crate::limits;
use crate::server::reply::cut;
use crate::wire::{self, MAX_STRING_BYTES, info, option, reply};

const LIST_CUT: Refusal = Refusal {
    code: reply::ERR_TOO_BIG,
    text: "there are more exports than can be listed",
};

/// The bytes that wait to be sent.
#[derive(Debug, Default)]
pub(super) struct Answers(Vec<u8>);

impl Answers {
    pub fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn greeting(&mut self, flags: u16) {
        self.0.extend_from_slice(&wire::INIT_MAGIC.to_be_bytes());
        self.0.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        self.0.extend_from_slice(&flags.to_be_bytes());
    }

    /// The one answer without a header (section "NBD_OPT_EXPORT_NAME").
    pub fn export_name(&mut self, size_bytes: u64, flags: u16, zeroes: bool) {
        self.0.extend_from_slice(&size_bytes.to_be_bytes());
        self.0.extend_from_slice(&flags.to_be_bytes());
        if zeroes {
            self.0.extend_from_slice(&[0; wire::EXPORT_NAME_ZEROES]);
        }
    }

    pub fn ack(&mut self, option: u32) {
        self.reply(option, reply::ACK, &[]);
    }

    pub fn error(&mut self, option: u32, refusal: Refusal) {
        self.reply(option, refusal.code, &[refusal.text.as_bytes()]);
    }

    /// The answer to LIST, up to the final ACK.
    pub fn list(&mut self, exports: &[(String, String)]) -> Result<(), Refusal> {
        let start = self.0.len();
        for (name, description) in exports {
            let name = cut(name, MAX_STRING_BYTES).as_bytes();
            let description = cut(description, MAX_STRING_BYTES).as_bytes();
            let entry_bytes = wire::OPTION_REPLY_BYTES + 4 + name.len() + description.len();
            if self.0.len() - start + entry_bytes > limits::LIST_BYTES {
                return Err(LIST_CUT);
            }
            let parts = [&len_field(name.len())[..], name, description];
            self.reply(option::LIST, reply::SERVER, &parts);
        }
        Ok(())
    }

    pub fn info_export(&mut self, option: u32, size_bytes: u64, flags: u16) {
        let parts = [
            &info::EXPORT.to_be_bytes()[..],
            &size_bytes.to_be_bytes(),
            &flags.to_be_bytes(),
        ];
        self.reply(option, reply::INFO, &parts);
    }

    pub fn info_text(&mut self, option: u32, kind: u16, text: &str) {
        let text = cut(text, MAX_STRING_BYTES).as_bytes();
        self.reply(option, reply::INFO, &[&kind.to_be_bytes()[..], text]);
    }

    /// Minimum, preferred block and maximum payload, in this order.
    pub fn info_block_size(&mut self, option: u32, sizes: [u32; 3]) {
        let [min, preferred, max] = sizes.map(u32::to_be_bytes);
        let parts = [&info::BLOCK_SIZE.to_be_bytes()[..], &min, &preferred, &max];
        self.reply(option, reply::INFO, &parts);
    }

    pub fn meta_context(&mut self, option: u32, context: Context) {
        let parts = [&context.id.to_be_bytes()[..], context.name.as_bytes()];
        self.reply(option, reply::META_CONTEXT, &parts);
    }

    fn reply(&mut self, option: u32, kind: u32, parts: &[&[u8]]) {
        let len = parts.iter().map(|part| part.len()).sum();
        self.0
            .extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
        self.0.extend_from_slice(&option.to_be_bytes());
        self.0.extend_from_slice(&kind.to_be_bytes());
        self.0.extend_from_slice(&len_field(len));
        for part in parts {
            self.0.extend_from_slice(part);
        }
    }
}

fn len_field(len: usize) -> [u8; 4] {
    u32::try_from(len)
        .expect("a reply holds a few strings of at most 4096 bytes")
        .to_be_bytes()
}
