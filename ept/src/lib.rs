//! One page-table engine for EPT, NPT, IOMMU and host tables, with guest walks and typed invalidation.
#![no_std]
