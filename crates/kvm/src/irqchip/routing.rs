//! GSI routing: which pins and messages a global system interrupt becomes.

use super::message::Message;
use crate::error::{Result, fail};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MSI_VALID_DEVID, kvm_irq_routing_entry,
};

/// The highest number of routes, and one more than the highest GSI.
pub const MAX_ROUTES: usize = 4096;

/// Where a GSI leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// An input of the 8259 pair.
    Pic(u8),
    /// A pin of the I/O APIC.
    IoApic(u8),
    /// A message, sent on each rising edge.
    Msi {
        /// Address.
        address: u64,
        /// Data.
        data: u32,
    },
}

/// The routes of every GSI.
#[derive(Clone, Debug, Default)]
pub struct Routing {
    routes: Vec<Vec<Route>>,
}

impl Routing {
    /// What KVM_CREATE_IRQCHIP sets up: GSIs 0 to 15 on both controllers, the rest on the I/O
    /// APIC.
    pub fn default_for_irqchip() -> Routing {
        let routes = (0..24u8)
            .map(|gsi| match gsi {
                0..16 => vec![Route::Pic(gsi), Route::IoApic(gsi)],
                _ => vec![Route::IoApic(gsi)],
            })
            .collect();
        Routing { routes }
    }

    /// Checks and converts the entries of KVM_SET_GSI_ROUTING.
    pub fn from_entries(
        entries: &[kvm_irq_routing_entry],
        in_kernel_chips: bool,
    ) -> Result<Routing> {
        let mut routing = Routing::default();
        for entry in entries {
            let gsi = entry.gsi as usize;
            if gsi >= MAX_ROUTES {
                return fail(libc::EINVAL);
            }
            let route = Self::convert(entry, in_kernel_chips)?;
            if routing.routes.len() <= gsi {
                routing.routes.resize(gsi + 1, Vec::new());
            }
            let routes = &mut routing.routes[gsi];
            // One GSI is one message or one pin of each chip.
            let clash = routes.iter().any(|other| match (other, &route) {
                (Route::Pic(_), Route::IoApic(_)) | (Route::IoApic(_), Route::Pic(_)) => false,
                (Route::Pic(a), Route::Pic(b)) => a >> 3 == b >> 3,
                _ => true,
            });
            if clash {
                return fail(libc::EINVAL);
            }
            routes.push(route);
        }
        Ok(routing)
    }

    fn convert(entry: &kvm_irq_routing_entry, in_kernel_chips: bool) -> Result<Route> {
        match entry.type_ {
            KVM_IRQ_ROUTING_IRQCHIP => {
                if entry.flags != 0 || !in_kernel_chips {
                    return fail(libc::EINVAL);
                }
                // SAFETY: the type names this member; every bit pattern of it is valid.
                let chip = unsafe { entry.u.irqchip };
                match (chip.irqchip, chip.pin) {
                    (KVM_IRQCHIP_PIC_MASTER, pin @ 0..8) => Ok(Route::Pic(pin as u8)),
                    (KVM_IRQCHIP_PIC_SLAVE, pin @ 0..8) => Ok(Route::Pic(pin as u8 + 8)),
                    (KVM_IRQCHIP_IOAPIC, pin @ 0..24) => Ok(Route::IoApic(pin as u8)),
                    _ => fail(libc::EINVAL),
                }
            }
            KVM_IRQ_ROUTING_MSI => {
                if entry.flags & !KVM_MSI_VALID_DEVID != 0 {
                    return fail(libc::EINVAL);
                }
                // SAFETY: as above.
                let msi = unsafe { entry.u.msi };
                let address = msi.address_lo as u64 | (msi.address_hi as u64) << 32;
                Ok(Route::Msi {
                    address,
                    data: msi.data,
                })
            }
            _ => fail(libc::EINVAL),
        }
    }

    /// Every route.
    pub fn all(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter().flatten()
    }

    /// Where `gsi` leads.
    pub fn of(&self, gsi: u32) -> &[Route] {
        self.routes.get(gsi as usize).map_or(&[], Vec::as_slice)
    }

    /// The GSIs that lead to `route`.
    pub fn gsis_of(&self, route: Route) -> impl Iterator<Item = u32> + '_ {
        let all = self.routes.iter().enumerate();
        all.filter(move |(_, routes)| routes.contains(&route))
            .map(|(gsi, _)| gsi as u32)
    }

    /// The messages of the first `count` GSIs: the pins of an I/O APIC in user space.
    pub fn messages(&self, count: usize, wide: bool) -> impl Iterator<Item = Message> + '_ {
        self.routes
            .iter()
            .take(count)
            .flatten()
            .filter_map(move |route| match *route {
                Route::Msi { address, data } => Some(Message::from_msi(address, data, wide)),
                _ => None,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_irq_routing_irqchip, kvm_irq_routing_msi};

    fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    }

    fn msi(gsi: u32, data: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi = kvm_irq_routing_msi {
            address_lo: 0xfee0_0000,
            data,
            ..Default::default()
        };
        entry
    }

    #[test]
    fn both_chips_or_one_message() {
        let ok = Routing::from_entries(&[pin(4, 0, 4), pin(4, 2, 4), msi(24, 0x40)], true).unwrap();
        assert_eq!(ok.of(4), [Route::Pic(4), Route::IoApic(4)]);
        assert_eq!(ok.of(5), []);
        assert_eq!(ok.gsis_of(Route::IoApic(4)).collect::<Vec<_>>(), [4]);
        assert!(Routing::from_entries(&[msi(1, 0), msi(1, 1)], true).is_err());
        assert!(Routing::from_entries(&[pin(1, 2, 24)], true).is_err());
        assert!(Routing::from_entries(&[pin(1, 2, 2)], false).is_err());
        assert!(Routing::from_entries(&[msi(4096, 0)], true).is_err());
        let hyperv = kvm_irq_routing_entry {
            type_: 4,
            ..Default::default()
        };
        assert!(Routing::from_entries(&[hyperv], true).is_err());
    }
}
