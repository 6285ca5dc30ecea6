# A guest that needs no operating system: shows one of each kind of exit, then switches itself off.
# Entered like a Linux vmlinux: 64-bit mode, low 4 GiB identity-mapped.
#
# Rebuild with guests/build; the result is committed because not every machine has an assembler.

        .set    COM1, 0x3f8
        .set    PM1_CONTROL, 0x604
        .set    POWER_OFF, (5 << 10) | (1 << 13)
        .set    MEMORY, 16 << 20            # touched memory: 16 to 32 MiB
        .set    PAGES, 4096
        .set    VIRTIO_MMIO, 0xd0000000
        .set    VIRTIO_MAGIC, 0x74726976
        .set    READS, 1000
        .set    STEPS, 8 << 20

        .text
        .globl  _start
_start:
        lea     stack_end(%rip), %rsp
        lea     hello(%rip), %rsi
        call    print

        # CPUID: who runs this?
        lea     running_on(%rip), %rsi
        call    print
        mov     $0x40000000, %eax
        cpuid
        lea     signature(%rip), %rsi
        mov     %ebx, (%rsi)
        mov     %ecx, 4(%rsi)
        mov     %edx, 8(%rsi)
        call    print
        lea     newline(%rip), %rsi
        call    print

        # Memory that nobody has touched yet: EPT violations, one for each page (or large page).
        lea     touching(%rip), %rsi
        call    print
        mov     $MEMORY, %rdi
        mov     $PAGES, %ecx
1:      mov     %rdi, (%rdi)
        add     $4096, %rdi
        dec     %ecx
        jnz     1b
        lea     done(%rip), %rsi
        call    print

        # A device register: EPT misconfigurations, one for each read.
        lea     reading(%rip), %rsi
        call    print
        mov     $VIRTIO_MMIO, %edi
        mov     $READS, %ecx
1:      mov     (%rdi), %eax
        cmp     $VIRTIO_MAGIC, %eax
        jne     wrong
        dec     %ecx
        jnz     1b
        lea     done(%rip), %rsi
        call    print

        # Plain computation over the touched memory: no exit at all.
        lea     summing(%rip), %rsi
        call    print
        xor     %eax, %eax
        xor     %edx, %edx
        mov     $STEPS, %ecx
1:      add     MEMORY(%rdx), %rax
        rol     $7, %rax
        add     $4096, %edx
        and     $(PAGES * 4096 - 1), %edx
        dec     %ecx
        jnz     1b
        call    print_hex
        jmp     off

wrong:  lea     unexpected(%rip), %rsi
        call    print
off:    mov     $PM1_CONTROL, %dx
        mov     $POWER_OFF, %ax
        out     %ax, %dx
1:      hlt
        jmp     1b

# Prints the zero-terminated string at RSI.
print:
        lodsb
        test    %al, %al
        jz      1f
        call    putc
        jmp     print
1:      ret

# Prints RAX as 16 hexadecimal digits and ends the line.
print_hex:
        mov     %rax, %rbx
        mov     $16, %ecx
1:      rol     $4, %rbx
        mov     %bl, %al
        and     $15, %al
        add     $'0', %al
        cmp     $'9', %al
        jbe     2f
        add     $('a' - '9' - 1), %al
2:      call    putc
        dec     %ecx
        jnz     1b
        lea     newline(%rip), %rsi
        jmp     print

# Prints AL when the transmitter is free.
putc:
        mov     %al, %ah
        mov     $(COM1 + 5), %dx
1:      in      %dx, %al
        test    $0x20, %al
        jz      1b
        mov     %ah, %al
        mov     $COM1, %dx
        out     %al, %dx
        ret

hello:          .asciz "Hello from a guest without an operating system.\r\n"
running_on:     .asciz "hypervisor signature: "
touching:       .asciz "touching 4096 pages ... "
reading:        .asciz "reading a device register 1000 times ... "
summing:        .asciz "summing 8388608 words: "
done:           .asciz "done\r\n"
unexpected:     .asciz "unexpected value\r\n"
newline:        .asciz "\r\n"
signature:      .fill 13, 1, 0

        .balign 16
        .fill   64, 8, 0
stack_end:
